# SPDX-License-Identifier: GPL-3.0-only
"""Draws what the panels of each dashboard show, for docs/dashboards.md: make screenshot.

The data are those that a real Prometheus returns for the panels' queries. It scrapes a real
exporter under load. Grafana draws them in its own style.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy import dashboards
from tests.e2e.dashboard_load import scraped_under_load
from tests.e2e.dashboard_queries import substituted
from tests.e2e.support import Prometheus
from tests.support import inside, new_netns

ROOT = Path(__file__).parents[2]

LOADED_S = 180
STEP_S = 2
INCHES_PER_COLUMN = 0.5
INCHES_PER_ROW = 0.24

Series = dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]


def main() -> None:
    rcParams["font.size"] = 7
    with (
        new_netns() as netns,
        inside(netns),
        tempfile.TemporaryDirectory() as directory,
        scraped_under_load(Path(directory), LOADED_S, STEP_S) as prometheus,
    ):
        for path in dashboards.FOLDER.glob("*.json"):
            _draw(json.loads(path.read_text()), prometheus).savefig(
                ROOT / f"docs/{path.stem}.png", dpi=75
            )


def _draw(dashboard: Mapping[str, Any], prometheus: Prometheus) -> Figure:
    last = dashboard["panels"][-1]["gridPos"]
    rows = last["y"] + last["h"]
    figure = Figure((24 * INCHES_PER_COLUMN, rows * INCHES_PER_ROW))
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        top = 1 - at["y"] / rows
        if panel["type"] == "row":
            figure.text(0.01, top - 0.6 / rows, panel["title"], va="center", weight="bold")
            continue
        axes = figure.add_axes(
            (
                (at["x"] + 1.2) / 24,
                top - (at["h"] - 0.8) / rows,
                (at["w"] - 1.6) / 24,
                (at["h"] - 2.2) / rows,
            )
        )
        axes.set_title(panel["title"], loc="left", fontsize=8)
        _draw_panel(axes, panel, [_data(prometheus, each) for each in panel["targets"]])
    return figure


def _data(prometheus: Prometheus, target: Mapping[str, Any]) -> Series:
    now_s = time.time()
    return prometheus.query_range(
        substituted(target["expr"]), now_s - LOADED_S + 20, now_s, STEP_S
    )


def _legend(target: Mapping[str, Any], labels: tuple[tuple[str, str], ...]) -> str:
    named = dict(labels) | {"instance": "host"}
    pattern = target["legendFormat"]
    return re.sub(r"{{(\w+)}}", lambda found: named.get(found[1], ""), pattern).strip()


def _draw_panel(axes: Axes, panel: Mapping[str, Any], data: Sequence[Series]) -> None:
    match panel["type"]:
        case "timeseries":
            _draw_lines(axes, panel, data)
        case "heatmap":
            _draw_buckets(axes, data[0])
        case "table":
            _draw_rows(axes, panel, data)
        case "stat":
            _draw_number(axes, panel, data[0])


def _draw_lines(axes: Axes, panel: Mapping[str, Any], data: Sequence[Series]) -> None:
    largest: list[tuple[float, str, list[tuple[float, float]]]] = []
    for target, series in zip(panel["targets"], data, strict=True):
        for labels, points in series.items():
            largest.append((points[-1][1], _legend(target, labels), points))
    largest.sort(key=lambda each: each[0], reverse=True)
    share = panel["fieldConfig"]["defaults"]["unit"] == "percentunit"
    for _, label, points in largest[:5]:
        times, values = zip(*points, strict=True)
        axes.plot(times, np.array(values) * (100 if share else 1), label=label, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xticks([])
    axes.set_ylabel(
        {"s": "s", "ops": "per s", "percentunit": "%", "bytes": "bytes"}.get(
            panel["fieldConfig"]["defaults"]["unit"], ""
        )
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="best", fontsize=5, framealpha=0.6)


def _draw_buckets(axes: Axes, series: Series) -> None:
    bounds = sorted(
        (float(dict(labels)["le"]), points) for labels, points in series.items()
    )
    counts = np.array([[value for _, value in points] for _, points in bounds])
    cells = np.diff(counts, axis=0, prepend=0)
    axes.imshow(cells, aspect="auto", origin="lower", cmap="Oranges")
    names = ["+Inf" if math.isinf(le) else f"{le:g} s" for le, _ in bounds]
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])


def _draw_rows(axes: Axes, panel: Mapping[str, Any], data: Sequence[Series]) -> None:
    axes.axis("off")
    hidden = {"__name__", "job", "instance"}
    columns: dict[tuple[str, ...], dict[str, str]] = {}
    for target, series in zip(panel["targets"], data, strict=True):
        for labels, points in series.items():
            key = tuple(value for name, value in labels if name not in hidden)
            columns.setdefault(key, {})[target["legendFormat"]] = f"{points[-1][1]:.3g}"
    names = [target["legendFormat"] for target in panel["targets"]]
    cells = [
        [" ".join(key), *(row.get(name, "") for name in names)]
        for key, row in list(columns.items())[:6]
    ]
    table = axes.table(
        cells, colLabels=["labels", *names], loc="upper left", cellLoc="left"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(6)


def _draw_number(axes: Axes, panel: Mapping[str, Any], series: Series) -> None:
    axes.axis("off")
    defaults = panel["fieldConfig"]["defaults"]
    texts = {
        value: each["text"]
        for mapping in defaults.get("mappings", [])
        for value, each in mapping["options"].items()
    }
    lines = []
    for labels, points in series.items():
        value = f"{points[-1][1]:g}"
        if defaults["unit"] == "percentunit":
            value = f"{points[-1][1]:.1%}"
        name = _legend(panel["targets"][0], labels)
        lines.append(f"{name} {texts.get(value, value)}" if texts else value)
    size = 10 if texts else 18
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=size)


if __name__ == "__main__":
    main()
