# SPDX-License-Identifier: GPL-3.0-only
"""What is measured: every figure with its unit, and what it has to reach."""

import enum
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tests.benchmarks.hold import PORTS

CONNECTIONS = 10_000
"""Held on loopback, where both ends are ours: the tracker has an entry for each end."""

TRACKED = 2 * CONNECTIONS
MIB_BYTES = 1 << 20

STATE_CHANGES_BY_FIN = 10
"""Of a loopback connection that both ends close, after one another.

The client goes through SYN_SENT, ESTABLISHED, FIN_WAIT1, FIN_WAIT2 and CLOSE, the server
through SYN_RECV, ESTABLISHED, CLOSE_WAIT, LAST_ACK and CLOSE, or the other way round once
they are established. TIME_WAIT is told of to nobody.
"""

STATE_CHANGES_BY_RST = 6
"""Of one that either end resets: ESTABLISHED is followed by CLOSE."""

SAMPLES_FOR_P99 = 100


class Unit(enum.StrEnum):
    """Of the samples, as the names of the figures have it."""

    SECONDS = "s"
    NANOSECONDS = "ns"
    BYTES = "bytes"
    RATIO = "ratio"
    TIMES = "times"
    PER_SECOND = "per_s"


@dataclass(frozen=True)
class Figure:
    """One row of the table of single figures."""

    name: str
    what: str
    unit: Unit
    at_most: float | None = None
    at_least: float | None = None
    """What it has to reach."""
    compared_with: str | None = None
    """Name of the figure that this one is given as a ratio of."""
    known_as: str = ""
    """What such a ratio calls this one."""
    samples: tuple[float, ...] = ()
    """None where this run could not measure it."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float | None:
        """None where there are too few samples for one."""
        if len(self.samples) < SAMPLES_FOR_P99:
            return None
        return statistics.quantiles(self.samples, n=100, method="inclusive")[-1]

    @property
    def is_reached(self) -> bool | None:
        """None where there is nothing to reach, or nothing was measured."""
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
        "seeding_bytes",
        "… temporary memory during the start (VmHWM − VmRSS)",
        Unit.BYTES,
        at_most=200 * MIB_BYTES,
    ),
)


def filled(samples: Mapping[str, Iterable[float]]) -> list[Figure]:
    """The figures with the samples that there are."""
    return [
        replace(figure, samples=tuple(samples.get(figure.name, ()))) for figure in FIGURES
    ]
