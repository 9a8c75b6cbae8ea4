# SPDX-License-Identifier: GPL-3.0-only
"""What is published: metric names, help texts, and the collector that fills them."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tcpexporter import clock, version
from tcpexporter.counting import SERIES, Selection, Series, count, listened
from tcpexporter.sources import Reconciliation, Source

PORT_LABELS = ("port", "tcp_version")

FORGET_NS = 300_000_000_000
"""How long a namespace without name, connection and listener keeps its series."""


class ConnectionCollector(Collector):
    """Reads its source at each scrape; remembers only which series it has published."""

    def __init__(
        self,
        source: Source,
        selection: Selection,
        *,
        duration_s: int,
        named: Series | None = None,
        names: Callable[[], Mapping[int, str]] | None = None,
        simple: bool = False,
        boottime_ns: Callable[[], int] = clock.boottime_ns,
    ) -> None:
        """Count the connections of ``source`` that are in ``selection``.

        Args:
            source: where the connections come from.
            selection: which of them are counted.
            duration_s: from what age on a connection is long-term.
            named: series that are there from the first scrape on, and stay.
            names: of the namespaces there are, by inode, if they are told apart.
            simple: publish one number without labels.
            boottime_ns: the clock of ``established_ns``.
        """
        self._source = source
        self._selection = selection
        self._duration_s = duration_s
        self._named = np.empty(0, np.uint64) if named is None else named
        self._names = names
        self._simple = simple
        self._boottime_ns = boottime_ns
        self._published = self._named
        self._used_ns: dict[int, int] = {}

    def collect(self) -> Iterator[Metric]:
        """The metric families of one scrape.

        Raises:
            SourceError: the source cannot be read.
        """
        started_s = time.perf_counter()
        now_ns = self._boottime_ns()
        since_ns = now_ns - self._duration_s * 1_000_000_000
        counts = count(self._source.read(), self._selection, since_ns)
        listening = listened(self._source.listeners(), self._selection)
        self._publish(np.union1d(counts.series, listening), now_ns)
        yield self._connections(
            "netstat_tcp_longterm_connections_total",
            f"TCP connections established for at least {self._duration_s} seconds.",
            counts.series,
            counts.long_term,
        )
        yield self._connections(
            "tcp_established_connections",
            "TCP connections that are established, whatever their age.",
            counts.series,
            counts.established,
        )
        yield from self._about_the_source(counts.total)
        yield GaugeMetricFamily(
            "tcpexporter_collect_duration_seconds",
            "How long it took to read and count the connections for this page.",
            time.perf_counter() - started_s,
        )

    def _publish(self, used: Series, now_ns: int) -> None:
        """What is used now, and was before, but for namespaces that are gone."""
        published = np.union1d(self._published, used)
        if self._names is not None:
            kept = {*self._names(), *used.view(SERIES)["netns"].tolist()}
            self._used_ns.update(dict.fromkeys(kept, now_ns))
            recent = [
                netns for netns, at in self._used_ns.items() if now_ns - at <= FORGET_NS
            ]
            self._used_ns = {netns: self._used_ns[netns] for netns in recent}
            published = published[np.isin(published.view(SERIES)["netns"], recent)]
        self._published = np.union1d(published, self._named)

    def _connections(
        self, name: str, text: str, series: Series, counts: npt.NDArray[np.int64]
    ) -> GaugeMetricFamily:
        if self._simple:
            return GaugeMetricFamily(name, text, int(counts.sum()))
        values = np.zeros(len(self._published), np.int64)
        values[np.searchsorted(self._published, series)] = counts
        names = self._names() if self._names else None
        labels = PORT_LABELS if names is None else (*PORT_LABELS, "netns")
        family = GaugeMetricFamily(name, text, labels=labels)
        rows = zip(self._published.view(SERIES).tolist(), values.tolist(), strict=True)
        for (ip_version, port, netns), number in rows:
            where = () if names is None else (names.get(netns, str(netns)),)
            family.add_metric((str(port), str(ip_version), *where), number)
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
                "Of the tracked connections, those known from the socket tables alone: "
                "their age is a lower bound.",
                report.seeded_connections,
            )
        if report.refused_seeds is not None:
            yield CounterMetricFamily(
                "tcpexporter_refused_seeds",
                "Connections found in the socket tables that there was no room for.",
                report.refused_seeds,
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
        "Connections that were added or removed because the kernel's word was missed.",
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
        "How long until the next comparison, unless events are missed; 0: only then.",
        done.interval_s,
    )
    yield GaugeMetricFamily(
        "tcpexporter_last_reconcile_timestamp_seconds",
        "When the last comparison ended or was found needless; 0: there was none yet.",
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
