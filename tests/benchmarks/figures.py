# SPDX-License-Identifier: GPL-3.0-only
"""The measured figures, each with its unit and its target."""

import enum
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tests.benchmarks.hold import PORTS
from tests.benchmarks.slot_readings import CHANGED, SLOTS

CONNECTIONS = 10_000
"""Connections that are held on loopback. The tracker has two entries for each, because
both ends are on this host."""

TRACKED = 2 * CONNECTIONS
MIB_BYTES = 1 << 20

STATE_CHANGES_BY_FIN = 10
"""State changes of a loopback connection when one end closes, and then the other.

The client passes SYN_SENT, ESTABLISHED, FIN_WAIT1, FIN_WAIT2 and CLOSE. The server passes
SYN_RECV, ESTABLISHED, CLOSE_WAIT, LAST_ACK and CLOSE. If the server closes first, each end
passes the closing states of the other. The tracepoint does not report TIME_WAIT.
"""

STATE_CHANGES_BY_RST = 6
"""State changes of a loopback connection that is reset: CLOSE follows ESTABLISHED."""

SAMPLES_FOR_P99 = 100


class Unit(enum.StrEnum):
    """The unit of the samples; the names of the figures end with it."""

    SECONDS = "s"
    NANOSECONDS = "ns"
    BYTES = "bytes"
    RATIO = "ratio"
    TIMES = "times"
    PER_SECOND = "per_s"


@dataclass(frozen=True)
class Figure:
    """A row of the table of single figures."""

    name: str
    what: str
    unit: Unit
    at_most: float | None = None
    at_least: float | None = None
    """The target: the median must be at least this."""
    compared_with: str | None = None
    """Name of another figure; the table shows the ratio of this figure to that one."""
    known_as: str = ""
    """Short name of this figure for the ratios of other figures."""
    samples: tuple[float, ...] = ()
    """The measured values; empty if this run could not measure the figure."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float | None:
        """The 99th percentile, or None if there are too few samples."""
        if len(self.samples) < SAMPLES_FOR_P99:
            return None
        return statistics.quantiles(self.samples, n=100, method="inclusive")[-1]

    @property
    def is_reached(self) -> bool | None:
        """Whether the median meets the target; None without a target or without samples."""
        if not self.samples or (self.at_most is None and self.at_least is None):
            return None
        return (self.at_most is None or self.median <= self.at_most) and (
            self.at_least is None or self.median >= self.at_least
        )


FIGURES = (
    Figure(
        "event_ns",
        "BPF program, mean per state change, half of the connections closed by FIN"
        " and half by RST",
        Unit.NANOSECONDS,
        at_most=250,
    ),
    Figure(
        "event_fin_ns",
        f"… of those closed by FIN: {STATE_CHANGES_BY_FIN} state changes per connection",
        Unit.NANOSECONDS,
        known_as="FIN",
    ),
    Figure(
        "event_rst_ns",
        f"… of those closed by RST: {STATE_CHANGES_BY_RST} state changes per connection",
        Unit.NANOSECONDS,
        compared_with="event_fin_ns",
    ),
    Figure(
        "event_times",
        "BPF program with `--clients=false`, mean per state change, divided by that of the"
        " earlier program, which had no series numbers",
        Unit.TIMES,
        at_most=1.3,
    ),
    Figure(
        "event_clients_times",
        "… with the hash of the client, the default",
        Unit.TIMES,
        at_most=1.4,
    ),
    Figure(
        "event_owners_times",
        "… with that hash and the cgroup of the socket (`--labels port,tcp_version,unit`)",
        Unit.TIMES,
        at_most=1.4,
    ),
    Figure(
        "event_histograms_times", "… with that hash and with `--histograms`", Unit.TIMES
    ),
    Figure(
        "rate_times",
        "connect, accept and close on loopback: rate with the exporter running,"
        " divided by the rate without it",
        Unit.TIMES,
        at_least=0.98,
    ),
    Figure(
        "rate_empty_times",
        "… with a program on the same tracepoint that does nothing",
        Unit.TIMES,
    ),
    Figure(
        "rate_to_empty_times",
        "… with the exporter running, divided by the rate with that program",
        Unit.TIMES,
        at_least=0.985,
    ),
    Figure("rate_with_per_s", "… with the exporter running", Unit.PER_SECOND),
    Figure("rate_without_per_s", "… without it", Unit.PER_SECOND),
    Figure(
        "scrape_s",
        f"GET /metrics, {TRACKED:,} tracked on {len(PORTS)} ports, warm",
        Unit.SECONDS,
        at_most=0.005,
        known_as="GET /metrics",
    ),
    Figure(
        "scrape_prometheus_s",
        "… as Prometheus requests it: OpenMetrics, gzip",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "scrape_seeded_s",
        f"… with the {TRACKED:,} pre-existing",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "scrape_node_exporter_times",
        f"GET /metrics, 1,000 sockets on {len(PORTS)} ports, divided by that of"
        " node_exporter's tcpstat",
        Unit.TIMES,
        at_most=0.6,
    ),
    Figure(
        "scrape_million_times",
        "GET /metrics, 1,000,000 sockets, divided by that with 1,000",
        Unit.TIMES,
        at_most=2.5,
        known_as="default labels",
    ),
    Figure(
        "scrape_million_without_clients_times",
        "… both with `--clients=false`",
        Unit.TIMES,
        at_most=2.5,
    ),
    Figure(
        "scrape_million_netns_all_times",
        "… the former with `--netns all`",
        Unit.TIMES,
        at_most=2.5,
        compared_with="scrape_million_times",
    ),
    Figure(
        "reading_unchanged_s",
        f"count {SLOTS:,} connections of as many clients in memory, CPU time: none has"
        " changed since the last scrape",
        Unit.SECONDS,
        known_as="unchanged",
    ),
    Figure(
        "reading_changed_s",
        f"… {CHANGED:,} have closed, and as many have opened",
        Unit.SECONDS,
        compared_with="reading_unchanged_s",
    ),
    Figure(
        "reading_first_s",
        "… the first scrape, which sorts all clients",
        Unit.SECONDS,
        compared_with="reading_unchanged_s",
    ),
    Figure(
        "rules_s",
        "GET /metrics, 100,000 sockets, time that 64 rules of `--expect` add which match"
        " nearly all connections",
        Unit.SECONDS,
        at_most=0.02,
    ),
    Figure(
        "rule_million_s",
        "… time that each of these rules adds, 1,000,000 sockets",
        Unit.SECONDS,
        at_most=0.003,
    ),
    Figure(
        "idle_cpu_ratio",
        f"CPU when idle, without scrapes, {TRACKED:,} tracked, of a core",
        Unit.RATIO,
        at_most=0.001,
    ),
    Figure(
        "idle_cpu_sock_diag_ratio",
        "… with `--source sock_diag`, which polls once a second",
        Unit.RATIO,
    ),
    Figure(
        "idle_cpu_procfs_ratio",
        "… with `--source procfs`, which polls once a second",
        Unit.RATIO,
    ),
    Figure(
        "resident_bytes",
        "resident memory (VmRSS) while serving, 1,000 tracked",
        Unit.BYTES,
        at_most=48 * MIB_BYTES,
    ),
    Figure(
        "resident_million_bytes",
        "… with 1,000,000 pre-existing sockets, after the first reconciliation",
        Unit.BYTES,
        at_most=128 * MIB_BYTES,
    ),
    Figure(
        "kernel_bytes",
        "kernel memory for each tracked connection, with full maps",
        Unit.BYTES,
        at_most=160,
    ),
    Figure(
        "ready_none_s",
        "time from start to ready, no pre-existing connections",
        Unit.SECONDS,
    ),
    Figure(
        "ready_million_s",
        "… with 1,000,000 pre-existing sockets",
        Unit.SECONDS,
        at_most=5,
    ),
    Figure(
        "ready_million_dumps_times",
        "… divided by the time of the kernel's dump with `tcp_info`",
        Unit.TIMES,
        at_most=3,
    ),
    Figure(
        "seeding_bytes",
        "… temporary memory during the start (VmHWM − VmRSS)",
        Unit.BYTES,
        at_most=200 * MIB_BYTES,
    ),
    Figure(
        "adopting_million_times",
        "time from start to ready with pinned state of 1,000,000 sockets, divided by that"
        " of a first start",
        Unit.TIMES,
        at_most=1.3,
    ),
    Figure(
        "adopting_bytes",
        "… peak of memory until then, above that after the first reconciliation",
        Unit.BYTES,
        at_most=200 * MIB_BYTES,
    ),
)


def filled(samples: Mapping[str, Iterable[float]]) -> list[Figure]:
    """Return all figures, each with its samples if there are any."""
    return [
        replace(figure, samples=tuple(samples.get(figure.name, ()))) for figure in FIGURES
    ]
