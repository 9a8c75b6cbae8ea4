# SPDX-License-Identifier: GPL-3.0-only
"""Draws the picture in docs/performance.md.

python -m tests.benchmarks.picture FILE SVG
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tests.benchmarks import report
from tests.benchmarks.number_format import format_seconds
from tests.benchmarks.sizes import OURS, Size

SIZE_INCHES = (8.0, 5.0)
AXES = (0.09, 0.11, 0.63, 0.81)
"""Left, bottom, width and height of the axes in the picture; labels are on the right."""

LABEL_GAP = 0.052
"""Minimum distance of two labels, as a share of the axes' height: a line of text."""

LABELS_AT = 1.03
"""Horizontal position of labels, as a multiple of the axes' width."""

# Without these settings each run would write other random identifiers and its date.
rcParams["svg.hashsalt"] = "tcpexporter"
METADATA = {"Date": None}
# Text is not converted to paths: the file is small and can be searched.
rcParams["svg.fonttype"] = "none"
rcParams["font.family"] = "sans-serif"


@dataclass(frozen=True)
class Style:
    """Style of the line of one method."""

    label: str
    colour: str
    dashed: bool = False


STYLES: Mapping[str, Style] = {
    "psutil": Style("psutil net_connections", "#b35806"),
    "items": Style("BCC items()", "#998ec3"),
    "ss": Style("ss | awk", "#542788"),
    "node_exporter": Style("node_exporter tcpstat", "#1b7837"),
    "dump_info": Style("kernel's dump with tcp_info", "#777777", dashed=True),
    "dump": Style("kernel's dump", "#777777", dashed=True),
    OURS: Style("tcpexporter", "#d6006c"),
    "scan": Style("sum of 64 bytes each", "#777777", dashed=True),
}
"""Styles by method. There is no line for polling sources, because a scrape does not
count."""


def draw(sizes: Sequence[Size], path: Path) -> Path:
    """Write an SVG of the time of a count by the number of sockets."""
    figure = Figure(figsize=SIZE_INCHES, facecolor="white")
    axes = figure.add_axes(AXES)
    lines = {name: _points(sizes, name) for name in STYLES}
    lines = {name: points for name, points in lines.items() if points}
    _axes(axes)
    for name, points in lines.items():
        _line(axes, points, STYLES[name], bold=name == OURS)
    _labels(axes, lines)
    figure.savefig(path, metadata=METADATA)
    return path


Points = Sequence[tuple[int, float]]
"""Points of a line: number of sockets, and median time in seconds."""


def _points(sizes: Sequence[Size], name: str) -> Points:
    measured = ((each.sockets, each.contender(name)) for each in sizes)
    return [
        (sockets, statistics.median(contender.wall_s))
        for sockets, contender in measured
        if contender and contender.wall_s
    ]


def _axes(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(
        "Time to count established connections per port", loc="left", fontsize=12
    )
    axes.set_xlabel("established sockets")
    axes.xaxis.set_major_locator(LogLocator(base=10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _round(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _round(value_s: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value_s * factor >= 1:
            return f"{value_s * factor:,.0f} {unit}"
    return format_seconds(value_s)


def _line(axes: Axes, points: Points, style: Style, *, bold: bool) -> None:
    sockets, median_s = zip(*points, strict=True)
    axes.plot(
        sockets,
        median_s,
        color=style.colour,
        linestyle="--" if style.dashed else "-",
        linewidth=3.0 if bold else 1.6,
        marker="o",
        markersize=6 if bold else 4,
        zorder=3 if bold else 2,
    )


def _labels(axes: Axes, lines: Mapping[str, Points]) -> None:
    """Label each line at its end; move labels apart where they would overlap."""
    # from here on the scale does not change, which `_on_axes` requires
    axes.autoscale_view()
    ends = {name: _on_axes(axes, points[-1]) for name, points in lines.items()}
    heights = _apart({name: y for name, (_, y) in ends.items()})
    for name, height in heights.items():
        axes.annotate(
            STYLES[name].label,
            xy=ends[name],
            xytext=(LABELS_AT, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=STYLES[name].colour,
            fontweight="bold" if name == OURS else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6},
        )


def _on_axes(axes: Axes, point: tuple[int, float]) -> tuple[float, float]:
    """Return the position of a point, as shares of the axes' width and height."""
    x, y = axes.transAxes.inverted().transform(axes.transData.transform(point))
    return float(x), float(y)


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Move labels up until each is at least a line of text above the next lower one."""
    apart: dict[str, float] = {}
    lowest = float("-inf")
    for name in sorted(heights, key=lambda each: heights[each]):
        lowest = apart[name] = max(heights[name], lowest + LABEL_GAP)
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="written by python -m tests.benchmarks")
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    draw(report.read(arguments.file).sizes, arguments.svg)


if __name__ == "__main__":
    main()
