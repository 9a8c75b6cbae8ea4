# SPDX-License-Identifier: GPL-3.0-only
"""Writes the tables of docs/performance.md from the figures of a full run.

    python -m tests.benchmarks.table FILE --write docs/performance.md

It replaces all text between two marker lines, so do not edit that text.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from tests import tables
from tests.benchmarks import report
from tests.benchmarks.figures import Figure, Unit
from tests.benchmarks.number_format import (
    format_bytes,
    format_digits,
    format_seconds,
    format_spread,
    format_value,
)
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import (
    DUMP_INFO,
    NETNS_ALL,
    NODE_EXPORTER,
    OURS,
    WITH_RULES,
    WITHOUT_CLIENTS,
    Kept,
    Measured,
    Size,
    Start,
)
from tests.tables import Table

BEGIN = "<!-- figures: written by python -m tests.benchmarks.table -->"
END = "<!-- end of figures -->"

GIB_BYTES = 1 << 30

CONTENDERS = {
    OURS: "**tcpexporter**, `--source ebpf`: GET /metrics",
    WITHOUT_CLIENTS: "tcpexporter, the same with `--clients=false`",
    WITH_RULES: "tcpexporter, the same with 64 rules of `--expect`",
    NETNS_ALL: "tcpexporter, the same with `--netns all`",
    "sock_diag": "tcpexporter, `--source sock_diag`, which polls: GET /metrics",
    "procfs": "tcpexporter, `--source procfs`, which polls: GET /metrics",
    NODE_EXPORTER: "node_exporter, collector tcpstat, no ports: GET /metrics",
    "ss": "`ss -Htn state established`, counted by awk",
    "psutil": "psutil `net_connections`, counted in Python",
    "items": "BCC's `items()` on a hash map, counted in Python",
    "dump": "lower bound: the kernel's own dump, not parsed",
    DUMP_INFO: "lower bound: the same with `tcp_info`",
    "scan": "lower bound: numpy's sum of 64 bytes per connection",
}
"""Names of the methods, in the order of the table."""


def markdown(measured: Report) -> str:
    """Return the tables and the conditions of the measurements, as Markdown."""
    parts = [tables.markdown(each) for each in _tables(measured)]
    return "\n\n".join([*parts, conditions(measured)])


def plain(measured: Report) -> str:
    """Return the same as plain text, with the spread of the samples."""
    parts = [*_tables(measured), _spreads(measured)]
    missed = [figure.name for figure in measured.figures if figure.is_reached is False]
    reached = f"target not met: {', '.join(missed) or 'none'}"
    return "\n\n".join([*map(tables.aligned, parts), conditions(measured), reached])


def write(measured: Report, path: Path) -> None:
    """Replace the text between the two marker lines of a file.

    Raises:
        ValueError: the file does not have the marker lines.
    """
    tables.replace(path, BEGIN, END, markdown(measured))


def _tables(measured: Report) -> list[Table]:
    sizes = [each for each in measured.sizes if not each.why_not]
    return [
        _by_contender("time for one count per port", sizes, _time),
        _by_contender("CPU time for it, user and system", sizes, _cpu),
        _ours(sizes),
        _single(measured.figures),
    ]


# --- One row for each method, one column for each size ---

Cell = Callable[[Size, str], str]


def _by_contender(heading: str, sizes: Sequence[Size], cell: Cell) -> Table:
    headings = [heading, *(f"{each.sockets:,} sockets" for each in sizes)]
    return [
        headings,
        *(
            [what, *(cell(each, name) for each in sizes)]
            for name, what in CONTENDERS.items()
        ),
    ]


def _time(each: Size, name: str) -> str:
    return _compared(each, name, lambda measured: measured.wall_s)


def _cpu(each: Size, name: str) -> str:
    return _compared(each, name, lambda measured: measured.cpu_s)


def _compared(each: Size, name: str, samples: Callable[[Measured], Sequence[float]]) -> str:
    """Format the median and its ratio to that of tcpexporter."""
    measured, ours = each.contender(name), each.contender(OURS)
    if measured is None or measured.why_not:
        return measured.why_not if measured else ""
    median_s = statistics.median(samples(measured))
    if name == OURS or ours is None or ours.why_not:
        return format_seconds(median_s)
    ratio = median_s / statistics.median(samples(ours))
    return f"{format_seconds(median_s)} (×{format_digits(ratio)})"


# --- Time and memory of the exporter, by size ---


def _ours(sizes: Sequence[Size]) -> Table:
    rows: dict[str, Callable[[Size], str]] = {
        "time from start to ready, with this many pre-existing connections": _ready,
        "… compared with the kernel's dump with `tcp_info`": _ready_in_dumps,
        "… temporary memory during the start": _seeding,
        "time from start to ready, with pinned state of this many": _adopting,
        "… compared with a first start": _adopting_in_starts,
        "… peak of memory until then, above that after the first reconciliation": (
            _adopting_memory
        ),
        "resident memory while serving": _resident,
        "… of an exporter that found them, after its first reconciliation": _settled,
        "kernel memory": lambda each: (
            format_bytes(each.kept.total_bytes) if each.kept else ""
        ),
        "… for each of `--max-connections`": _kept_per_slot,
        "… for each tracked, as many as `--max-connections`": _kept_per_tracked,
    }
    headings = [
        "tcpexporter, `--source ebpf`",
        *(f"{each.sockets:,} sockets" for each in sizes),
    ]
    return [headings, *([what, *map(cell, sizes)] for what, cell in rows.items())]


def _ready(each: Size) -> str:
    return format_seconds(_ready_s(each.starts)) if each.starts else ""


def _ready_in_dumps(each: Size) -> str:
    dump = each.contender(DUMP_INFO)
    if not each.starts or dump is None or dump.why_not:
        return ""
    return f"×{format_digits(_ready_s(each.starts) / statistics.median(dump.wall_s))}"


def _ready_s(starts: Sequence[Start]) -> float:
    return statistics.median(start.took_s for start in starts)


def _seeding(each: Size) -> str:
    return _median_bytes([start.memory.above_bytes for start in each.starts])


def _adopting(each: Size) -> str:
    return format_seconds(_ready_s(each.adoptions)) if each.adoptions else ""


def _adopting_in_starts(each: Size) -> str:
    if not each.starts or not each.adoptions:
        return ""
    return f"×{format_digits(_ready_s(each.adoptions) / _ready_s(each.starts))}"


def _adopting_memory(each: Size) -> str:
    return _median_bytes([start.above_settled_bytes for start in each.adoptions])


def _settled(each: Size) -> str:
    return _median_bytes([start.settled.resident_bytes for start in each.starts])


def _median_bytes(samples: Sequence[int]) -> str:
    return format_bytes(statistics.median(samples)) if samples else ""


def _resident(each: Size) -> str:
    ours = each.contender(OURS)
    return format_bytes(ours.memory.resident_bytes) if ours and ours.memory else ""


def _kept_per_slot(each: Size) -> str:
    if each.kept is None:
        return ""
    return format_bytes(each.kept.total_bytes / each.kept.max_connections)


def _kept_per_tracked(each: Size) -> str:
    kept: Kept | None = each.kept_full
    return format_bytes(kept.total_bytes / kept.tracked) if kept else ""


# --- Single figures ---


def _single(figures: Sequence[Figure]) -> Table:
    by_name = {figure.name: figure for figure in figures}
    return [
        ["what", "target", "measured"],
        *(
            [figure.what, _to_reach(figure), _measured(figure, by_name)]
            for figure in figures
        ),
    ]


def _to_reach(figure: Figure) -> str:
    if figure.at_most is not None:
        return f"≤ {format_value(figure.at_most, figure.unit)}"
    return (
        "" if figure.at_least is None else f"≥ {format_value(figure.at_least, figure.unit)}"
    )


def _measured(figure: Figure, by_name: dict[str, Figure]) -> str:
    if not figure.samples:
        return "not measured"
    parts = []
    if figure.p99 is not None:
        parts.append(f"p99 {format_value(figure.p99, figure.unit)}")
    base = by_name[figure.compared_with] if figure.compared_with else None
    if base and base.samples:
        parts.append(f"×{format_digits(figure.median / base.median)} {base.known_as}")
    median = format_value(figure.median, figure.unit)
    shown = f"{median} ({', '.join(parts)})" if parts else median
    return f"{shown}, missed" if figure.is_reached is False else shown


def _spreads(measured: Report) -> Table:
    """List the spread of each median above that has more than one sample."""
    rows = [
        [figure.name, format_spread(figure.samples, figure.unit)]
        for figure in measured.figures
        if figure.samples
    ]
    rows += [
        [f"{name}, {each.sockets:,} sockets", format_spread(contender.wall_s, Unit.SECONDS)]
        for each in measured.sizes
        for name in CONTENDERS
        if (contender := each.contender(name)) and contender.wall_s
    ]
    return [["spread of", "smallest to largest"], *rows]


# --- Conditions of the measurements ---


def conditions(measured: Report) -> str:
    """Describe the machine, the procedure, and what was not measured."""
    return " ".join(chain(_where(measured), _how(measured), _not_measured(measured)))


def _where(measured: Report) -> Iterator[str]:
    machine, versions = measured.machine, measured.versions
    memory_gib = int(machine["memory_bytes"]) / GIB_BYTES
    yield f"{machine['cpu']}, {machine['cores']} cores, {memory_gib:.0f} GiB;"
    yield f"Linux {measured.kernel['release']}, Python {versions['python']},"
    yield f"node_exporter {versions['node_exporter']}, psutil {versions['psutil']},"
    yield f"iproute2 {versions['iproute2']}, BCC {versions['bcc']};"
    yield f"{measured.date[:10]}, revision {versions['revision']};"
    yield f"load average {measured.load_average[0]:.1f} at the start."
    if measured.other_exporters:
        yield f"Other exporters on the host: {measured.other_exporters}."
    if measured.kernel["bpf_stats_enabled"]:
        yield "kernel.bpf_stats_enabled was 1."


def _how(measured: Report) -> Iterator[str]:
    yield "Medians, and in parentheses the ratio to tcpexporter's."
    maximums = {
        each.max_connections: f"{each.max_connections:,}"
        for each in measured.sizes
        if not each.why_not
    }
    yield f"`--max-connections` was {' or '.join(maximums.values())}."
    yield "CPU time of the polling sources includes the polls, with one scrape a second."
    changes = measured.state_changes
    elsewhere = max(changes["run"] + changes["missed"] - changes["expected"], 0)
    yield f"The BPF program was timed over {changes['expected']:,} state changes,"
    yield f"{changes['expected_of_established']:,} of them into or out of ESTABLISHED"
    yield f"({elsewhere:,} more elsewhere on the host, {changes['missed']:,} missed)."
    yield f"While idle it reconciled {measured.idle_reconciliations} times."


def _not_measured(measured: Report) -> Iterator[str]:
    for each in measured.sizes:
        if each.why_not:
            yield f"{each.sockets:,} sockets: not measured, because {each.why_not}."
        for sentence in each.missing:
            yield f"{each.sockets:,} sockets: {sentence}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="written by python -m tests.benchmarks")
    parser.add_argument(
        "--write", type=Path, help="replace the text between the marker lines of this file"
    )
    arguments = parser.parse_args()
    measured = report.read(arguments.file)
    if arguments.write:
        write(measured, arguments.write)
    else:
        sys.stdout.write(f"{markdown(measured)}\n")


if __name__ == "__main__":
    main()
