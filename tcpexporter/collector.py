# SPDX-License-Identifier: GPL-3.0-only
"""What is published: metric names, help texts, and the collector that fills them."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tcpexporter import version
from tcpexporter.counting import IP_VERSIONS, PerPort, PortMask, Selection, count, listened
from tcpexporter.sources import Reconciliation, Source

PORT_LABELS = ("port", "tcp_version")


class ConnectionCollector(Collector):
    """Reads its source at each scrape; remembers only which ports it has published."""

    def __init__(
        self,
        source: Source,
        selection: Selection,
        *,
        duration_s: int,
        named_ports: Iterable[int] = (),
        simple: bool = False,
        boottime_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    ) -> None:
        """Count the connections of ``source`` that are in ``selection``.

        Args:
            source: where the connections come from.
            selection: which of them are counted.
            duration_s: from what age on a connection is long-term.
            named_ports: have a series from the first scrape on.
            simple: publish one number without labels.
            boottime_ns: the clock of ``established_ns``.
        """
        self._source = source
        self._selection = selection
        self._duration_s = duration_s
        self._simple = simple
        self._boottime_ns = boottime_ns
        self._published = np.zeros_like(selection.mask)
        self._published[:, list(named_ports)] = True
        self._published &= selection.mask

    def collect(self) -> Iterator[Metric]:
        """The metric families of one scrape.

        Raises:
            SourceError: the source cannot be read.
        """
        started_s = time.perf_counter()
        since_ns = self._boottime_ns() - self._duration_s * 1_000_000_000
        counts = count(self._source.read(), self._selection, since_ns)
        self._published |= listened(self._source.listeners(), self._selection)
        self._published |= counts.established > 0
        yield self._connections(
            "netstat_tcp_longterm_connections_total",
            f"TCP connections established for at least {self._duration_s} seconds.",
            counts.long_term,
        )
        yield self._connections(
            "tcp_established_connections",
            "TCP connections that are established, whatever their age.",
            counts.established,
        )
        yield from self._about_the_source(counts.total)
        yield GaugeMetricFamily(
            "tcpexporter_collect_duration_seconds",
            "How long it took to read and count the connections for this page.",
            time.perf_counter() - started_s,
        )

    def _connections(self, name: str, text: str, counts: PerPort) -> GaugeMetricFamily:
        if self._simple:
            return GaugeMetricFamily(name, text, int(counts.sum()))
        family = GaugeMetricFamily(name, text, labels=PORT_LABELS)
        for port, ip_version, number in _by_port(self._published, counts):
            family.add_metric((str(port), str(ip_version)), number)
        return family

    def _about_the_source(self, total: int) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "tcpexporter_source",
            "Where the connections come from, as --source has it.",
            {"source": self._source.name},
        )
        yield GaugeMetricFamily(
            "tcpexporter_tracked_connections",
            "TCP connections that are known, of every port, direction and IP version.",
            total,
        )
        report = self._source.report()
        if report.max_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_max_connections",
                "TCP connections that there is room for.",
                report.max_connections,
            )
        if report.seeded_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_seeded_connections",
                "Of the tracked connections, those known from the socket tables alone, whose "
                "age is a lower bound.",
                report.seeded_connections,
            )
        if report.kernel_events:
            yield _by_label(
                "tcpexporter_kernel_events",
                "Connections that the BPF program inserted, removed, or had no room for.",
                "action",
                report.kernel_events,
            )
        if report.missed_events is not None:
            yield CounterMetricFamily(
                "tcpexporter_missed_events",
                "Changes of state that the kernel did not run the BPF program for.",
                report.missed_events,
            )
        if report.reconciliation is not None:
            yield from _about_reconciling(report.reconciliation)


def _about_reconciling(done: Reconciliation) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "tcpexporter_reconciliations",
        "How often the connections were compared with the kernel's socket tables.",
        done.runs,
    )
    yield _by_label(
        "tcpexporter_corrections",
        "Connections that were added because their opening was missed, or removed as "
        "their closing was.",
        "kind",
        {"missed_open": done.missed_open, "missed_close": done.missed_close},
    )
    yield GaugeMetricFamily(
        "tcpexporter_reconcile_duration_seconds",
        "How long the last comparison took.",
        done.duration_s,
    )
    yield GaugeMetricFamily(
        "tcpexporter_reconcile_interval_seconds",
        "How long until the next comparison, unless events are missed; 0: not without that.",
        done.interval_s,
    )
    yield GaugeMetricFamily(
        "tcpexporter_last_reconcile_timestamp_seconds",
        "When the last comparison ended; 0: there was none yet.",
        done.finished_s,
    )


def _by_label(
    name: str, text: str, label: str, values: Mapping[str, int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, number in values.items():
        family.add_metric((value,), number)
    return family


class BuildCollector(Collector):
    """Which tcpexporter this is."""

    def collect(self) -> Iterator[Metric]:
        """One family that never changes."""
        yield InfoMetricFamily(
            "tcpexporter_build",
            "The version of tcpexporter, the commit it was built from, and its Python.",
            {
                "version": version.VERSION,
                "revision": version.REVISION,
                "python": platform.python_version(),
            },
        )


def make_registry(collector: ConnectionCollector) -> CollectorRegistry:
    """Everything a scrape shows, on one page."""
    registry = CollectorRegistry()
    registry.register(collector)
    registry.register(BuildCollector())
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _by_port(published: PortMask, counts: PerPort) -> Iterator[tuple[int, int, int]]:
    places, ports = np.nonzero(published)
    for place, port, number in zip(
        places.tolist(), ports.tolist(), counts[published].tolist(), strict=True
    ):
        yield port, IP_VERSIONS[place], number
