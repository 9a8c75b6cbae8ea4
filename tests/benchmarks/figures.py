# SPDX-License-Identifier: GPL-3.0-only
"""What is measured: every figure with its unit, and what it has to reach."""

import enum
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

CONNECTIONS = 10_000
"""Held on loopback, where both ends are ours: the tracker has an entry for each end."""

TRACKED = 2 * CONNECTIONS
PORTS = range(20_000, 20_050)
"""Listened on; below the ephemeral ports, so that no client has one of them."""

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
    PER_SECOND = "per_s"


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    what: str
    unit: Unit
    to_reach: float | None = None
    """At most this."""
    compared_with: str | None = None
    """Name of the figure that this one is given as a ratio of."""
    known_as: str = ""
    """What such a ratio calls this one."""
    paired: bool = False
    """Whether each sample belongs to the one of that figure taken beside it."""
    samples: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float | None:
        """None where there are too few samples for one."""
        if len(self.samples) < SAMPLES_FOR_P99:
            return None
        return statistics.quantiles(self.samples, n=100, method="inclusive")[-1]

    def ratio(self, base: "Figure") -> float:
        if not self.paired:
            return self.median / base.median
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.samples, base.samples, strict=True)
        )


FIGURES = (
    Figure(
        "event_ns",
        "BPF program, mean per state change, half of the connections closed by FIN"
        " and half by RST",
        Unit.NANOSECONDS,
        to_reach=300,
    ),
    Figure(
        "event_fin_ns",
        f"… of those closed by FIN: {STATE_CHANGES_BY_FIN} state changes a connection",
        Unit.NANOSECONDS,
        known_as="FIN",
    ),
    Figure(
        "event_rst_ns",
        f"… of those closed by RST: {STATE_CHANGES_BY_RST} state changes a connection",
        Unit.NANOSECONDS,
        compared_with="event_fin_ns",
    ),
    Figure(
        "scrape_s",
        f"HTTP GET /metrics, {TRACKED:,} tracked on {len(PORTS)} ports, warm",
        Unit.SECONDS,
        to_reach=0.025,
        known_as="GET /metrics",
    ),
    Figure(
        "scrape_prometheus_s",
        "… as Prometheus asks for it: OpenMetrics, gzip",
        Unit.SECONDS,
        to_reach=0.025,
        compared_with="scrape_s",
    ),
    Figure(
        "scrape_seeded_s",
        f"… with the {TRACKED:,} older than the exporter",
        Unit.SECONDS,
        to_reach=0.025,
        compared_with="scrape_s",
    ),
    Figure(
        "ss_s",
        "`ss -Htn state established`, counted per port by awk",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "split_s",
        "/proc/net/tcp, split and counted per port in Python",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "scrape_sock_diag_s",
        "GET /metrics with `--source sock_diag`",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "scrape_procfs_s",
        "GET /metrics with `--source procfs`",
        Unit.SECONDS,
        compared_with="scrape_s",
    ),
    Figure(
        "resident_bytes",
        f"resident memory, serving, {TRACKED:,} tracked (VmRSS)",
        Unit.BYTES,
        to_reach=64 * 2**20,
        known_as="VmRSS",
    ),
    Figure(
        "resident_published_bytes",
        "… as process_resident_memory_bytes",
        Unit.BYTES,
        to_reach=64 * 2**20,
        compared_with="resident_bytes",
    ),
    Figure(
        "resident_seeded_bytes",
        f"… with the {TRACKED:,} older than the exporter (VmRSS)",
        Unit.BYTES,
        to_reach=64 * 2**20,
        compared_with="resident_bytes",
    ),
    Figure(
        "idle_cpu_ratio",
        f"CPU when nothing happens and nobody scrapes, {TRACKED:,} tracked, of a core",
        Unit.RATIO,
        to_reach=0.001,
    ),
    Figure(
        "idle_cpu_sock_diag_ratio",
        "… with `--source sock_diag`, which polls once a second",
        Unit.RATIO,
        known_as="sock_diag",
    ),
    Figure(
        "idle_cpu_procfs_ratio",
        "… with `--source procfs`, which polls once a second",
        Unit.RATIO,
        compared_with="idle_cpu_sock_diag_ratio",
    ),
    Figure(
        "ready_s",
        f"from start to ready, {TRACKED:,} connections already there",
        Unit.SECONDS,
        to_reach=2,
        compared_with="ready_none_s",
    ),
    Figure(
        "ready_none_s",
        "… none there",
        Unit.SECONDS,
        known_as="none there",
    ),
    Figure(
        "rate_with_per_s",
        "connect, accept and close on loopback, with the exporter running",
        Unit.PER_SECOND,
        compared_with="rate_without_per_s",
        paired=True,
    ),
    Figure(
        "rate_without_per_s",
        "… without it",
        Unit.PER_SECOND,
        known_as="without it",
    ),
)


def filled(samples: Mapping[str, Iterable[float]]) -> list[Figure]:
    """The figures with their samples; every one has some."""
    return [replace(figure, samples=tuple(samples[figure.name])) for figure in FIGURES]
