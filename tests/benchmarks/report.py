# SPDX-License-Identifier: GPL-3.0-only
"""What was measured: as a file, and as the rows of a table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.figures import CONNECTIONS, TRACKED, Figure, Unit

_MIB_BYTES = 2**20
_GIB_BYTES = 2**30


@dataclass(frozen=True)
class Report:
    """All there is to know about one run."""

    date: str
    command: str
    took_s: float
    machine: Mapping[str, str | int]
    kernel: Mapping[str, str | int]
    versions: Mapping[str, str]
    load_average: Sequence[float]
    """Of one minute, before and after: who else was busy."""
    other_exporters: int
    """Attached on the host all the time: they slow down every state change a little."""
    tracked: int
    """Entries in the tracker while scrapes were timed."""
    idle_reconciliations: int
    """While nothing happened."""
    state_changes: Mapping[str, int]
    """Of all rounds in which the BPF program was timed."""
    figures: Sequence[Figure]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Report:
    """A report that was written."""
    fields: dict[str, Any] = json.loads(path.read_text())
    figures = [
        Figure(**{**each, "unit": Unit(each["unit"]), "samples": tuple(each["samples"])})
        for each in fields.pop("figures")
    ]
    return Report(figures=figures, **fields)


class Row(NamedTuple):
    """Of a table: how one figure is shown."""

    what: str
    to_reach: str
    measured: str
    ratio: str
    spread: str
    """Smallest, largest and number of samples."""


HEADINGS = Row("what", "figure to reach", "measured", "ratio", "spread")


def rows(report: Report) -> Iterator[Row]:
    by_name = {figure.name: figure for figure in report.figures}
    for figure in report.figures:
        yield Row(
            figure.what,
            "" if figure.to_reach is None else f"≤ {_shown(figure.to_reach, figure.unit)}",
            _measured(figure),
            _ratio(figure, by_name),
            _spread(figure),
        )


def conditions(report: Report) -> str:
    """What the figures are true of, as a few sentences."""
    sentences = [_where(report), _what(report), _state_changes(report)]
    if report.other_exporters:
        sentences.append(f"{report.other_exporters} other exporters ran on the host.")
    if report.kernel["bpf_stats_enabled"]:
        sentences.append("kernel.bpf_stats_enabled was 1 all the time.")
    return " ".join(sentences)


def _where(report: Report) -> str:
    machine = report.machine
    memory_gib = int(machine["memory_bytes"]) / _GIB_BYTES
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {memory_gib:.0f} GiB;"
        f" Linux {report.kernel['release']}, Python {report.versions['python']};"
        f" {report.date[:10]}, revision {report.versions['revision']};"
        f" load average {report.load_average[0]:.1f} when it began."
    )


def _what(report: Report) -> str:
    return (
        f"Medians; {TRACKED:,} tracked are the two ends of each of"
        f" {CONNECTIONS:,} loopback connections."
        f" While nothing happened it reconciled {report.idle_reconciliations} times."
    )


def _state_changes(report: Report) -> str:
    changes = report.state_changes
    elsewhere = max(changes["run"] + changes["missed"] - changes["expected"], 0)
    return (
        f"The BPF program was timed over {changes['expected']:,} state changes,"
        f" {changes['expected_of_established']:,} of them into or out of ESTABLISHED"
        f" ({elsewhere:,} more were elsewhere on the host, {changes['missed']:,} missed)."
    )


def _measured(figure: Figure) -> str:
    shown = _shown(figure.median, figure.unit)
    return f"{shown} (p99 {_shown(figure.p99, figure.unit)})" if figure.p99 else shown


def _ratio(figure: Figure, by_name: Mapping[str, Figure]) -> str:
    if figure.compared_with is None:
        return ""
    base = by_name[figure.compared_with]
    return f"{figure.ratio(base):.3g} times {base.known_as}"


def _spread(figure: Figure) -> str:
    if len(figure.samples) == 1:
        return "1 sample"
    least, most = (_shown(end(figure.samples), figure.unit) for end in (min, max))
    return f"{least} to {most}, {len(figure.samples)} samples"


def _shown(value: float, unit: Unit) -> str:
    match unit:
        case Unit.SECONDS if value < 1:
            return f"{value * 1000:.3g} ms"
        case Unit.SECONDS:
            return f"{value:.3g} s"
        case Unit.NANOSECONDS:
            return f"{value:.0f} ns"
        case Unit.BYTES:
            return f"{value / _MIB_BYTES:.3g} MiB"
        case Unit.RATIO:
            return f"{value * 100:.2g} %"
        case Unit.PER_SECOND:
            return f"{value:,.0f} /s"
