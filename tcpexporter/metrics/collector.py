# SPDX-License-Identifier: GPL-3.0-only
"""Collects the metrics: names, help texts, and values from a source of connections."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

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

from tcpexporter import clock
from tcpexporter.connections.counting import (
    SERIES,
    Counts,
    Selection,
    Series,
    count,
    fold,
    listened,
)
from tcpexporter.connections.source import Reconciliation, Report, Source
from tcpexporter.host.background import Task
from tcpexporter.metrics.exporter_status import (
    BackgroundCollector,
    BuildCollector,
    ReloadCollector,
    counter_by_label,
)
from tcpexporter.metrics.reload_status import Reloads

PORT_LABELS = ("port", "tcp_version")

Labels: TypeAlias = tuple[str, ...]
"""Label values of a series: `PORT_LABELS`, then netns if series are per namespace."""

FORGET_NS = 300_000_000_000
"""How long a namespace must have no name, connection and listener to lose its series."""


class Choice(NamedTuple):
    """The selection of connections, as the settings in force define it."""

    selection: Selection
    named: Series
    """Series that exist from the first scrape on, and are never folded."""
    duration_s: int
    """Minimum age of a long-term connection, in seconds."""


class ConnectionCollector(Collector):
    """Reads a source at each scrape; between scrapes it keeps only the published series."""

    def __init__(
        self,
        source: Source,
        choice: Choice,
        *,
        max_series: int,
        names: Callable[[], Mapping[int, str]] | None = None,
        simple: bool = False,
        boottime_ns: Callable[[], int] = clock.boottime_ns,
    ) -> None:
        """Count the connections of a source.

        Args:
            source: the source of the connections.
            choice: the connections to count, until `choose` replaces it.
            max_series: the maximum number of ports with series of their own. If there are
                more ports, the smallest series are folded into one.
            names: a function that returns the names of namespaces by inode; None if series
                are not per namespace.
            simple: whether to publish one number without labels.
            boottime_ns: a function that returns CLOCK_BOOTTIME, in ns.
        """
        self.tracked: int | None = None
        """Number of tracked connections at the last scrape; None: no scrape yet."""
        self._source = source
        self._choice = self._published_by = choice
        self._max_series = max_series
        self._names = names
        self._simple = simple
        self._boottime_ns = boottime_ns
        self._published = choice.named
        self._gone_ns: dict[int, int] = {}
        self._names_before: Mapping[int, str] = {}

    def choose(self, choice: Choice) -> None:
        """Count these connections from the next scrape on. Any thread may call this.

        Published series that the new choice does not select are removed.
        """
        self._choice = choice

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families of one scrape.

        Raises:
            SourceError: the source cannot be read.
        """
        started_s = time.perf_counter()
        now_ns = self._boottime_ns()
        choice = self._choice
        since_ns = now_ns - choice.duration_s * 1_000_000_000
        names = self._names() if self._names else None
        # The report is read before the connections: an exposition that shows the end
        # of a reconciliation must also show its corrections.
        report = self._source.report()
        counts = count(self._source.read(), choice.selection, since_ns)
        self.tracked = counts.total
        folded, labels = 0, list[Labels]()
        if not self._simple:
            counts, folded = self._publish(counts, choice, now_ns, names)
            labels = _labels(counts.series, names)
        yield self._connections(
            "netstat_tcp_longterm_connections_total",
            "TCP connections established for at least tcpexporter_duration_seconds.",
            labels,
            counts.long_term,
        )
        yield self._connections(
            "tcp_established_connections",
            "TCP connections that are established, of any age.",
            labels,
            counts.established,
        )
        yield GaugeMetricFamily(
            "tcpexporter_duration_seconds",
            "Minimum age of a long-term TCP connection (--duration).",
            choice.duration_s,
        )
        yield GaugeMetricFamily(
            "tcpexporter_folded_series",
            'Series summed up in port="other" because there are more than --max-series.',
            folded,
        )
        yield from self._source_families(report, counts.total)
        yield GaugeMetricFamily(
            "tcpexporter_collect_duration_seconds",
            "Time needed to read and count the connections for this scrape.",
            time.perf_counter() - started_s,
        )

    def _publish(
        self,
        counts: Counts,
        choice: Choice,
        now_ns: int,
        names: Mapping[int, str] | None,
    ) -> tuple[Counts, int]:
        """Return the counts to publish and the number of folded series.

        They include the series that were published before.
        """
        listening = listened(self._source.listeners(), choice.selection)
        if choice is not self._published_by:
            self._published = listened(self._published.view(SERIES), choice.selection)
            self._published_by = choice
        if names is not None:
            self._forget_renamed(names)
            self._forget_gone({*names, *_namespaces(counts.series, listening)}, now_ns)
        page, folded = fold(
            counts,
            listening=listening,
            named=choice.named,
            published=self._published,
            max_series=self._max_series,
        )
        self._published = page.series
        return page, folded

    def _forget_renamed(self, names: Mapping[int, str]) -> None:
        """Forget the series of namespaces whose name has changed or is gone.

        The kernel reuses inodes, so a new namespace with other ports may have that inode
        now.
        """
        before, self._names_before = self._names_before, dict(names)
        renamed = [
            netns
            for netns in _namespaces(self._published)
            if names.get(netns) != before.get(netns)
        ]
        self._forget_series(renamed)

    def _forget_series(self, netns: Sequence[int]) -> None:
        is_forgotten = np.isin(self._published.view(SERIES)["netns"], netns)
        self._published = self._published[~is_forgotten]

    def _forget_gone(self, present: set[int], now_ns: int) -> None:
        """Forget the series of namespaces that have been gone for FORGET_NS."""
        gone = {*_namespaces(self._published)} - {*present, 0}
        self._gone_ns = {netns: self._gone_ns.get(netns, now_ns) for netns in gone}
        expired = [
            netns for netns, since in self._gone_ns.items() if now_ns - since > FORGET_NS
        ]
        self._forget_series(expired)

    def _connections(
        self,
        name: str,
        text: str,
        labels: Sequence[Labels],
        numbers: npt.NDArray[np.int64],
    ) -> GaugeMetricFamily:
        if self._simple:
            return GaugeMetricFamily(name, text, int(numbers.sum()))
        names = (*PORT_LABELS, "netns") if self._names else PORT_LABELS
        family = GaugeMetricFamily(name, text, labels=names)
        for values, number in zip(labels, numbers.tolist(), strict=True):
            family.add_metric(values, number)
        return family

    def _source_families(self, report: Report, total: int) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "tcpexporter_source",
            "Source that the connections are read from (--source).",
            {"source": self._source.name},
        )
        yield GaugeMetricFamily(
            "tcpexporter_tracked_connections",
            "TCP connections that are tracked, of every port, direction and IP version.",
            total,
        )
        if report.max_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_max_connections",
                "Maximum number of TCP connections that can be tracked.",
                report.max_connections,
            )
        if report.seeded_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_seeded_connections",
                "Tracked connections that were established before the exporter started;"
                " their age is a lower bound unless it was restored.",
                report.seeded_connections,
            )
        if report.refused_seeds is not None:
            yield CounterMetricFamily(
                "tcpexporter_refused_seeds",
                "Connections in the socket tables that did not fit into the BPF map.",
                report.refused_seeds,
            )
        if report.kernel_events:
            yield counter_by_label(
                "tcpexporter_kernel_events",
                "Connections that the BPF program inserted, removed or refused (map full).",
                "action",
                report.kernel_events,
            )
        if report.missed_events is not None:
            yield CounterMetricFamily(
                "tcpexporter_missed_events",
                "Socket state changes for which the kernel skipped the BPF program.",
                report.missed_events,
            )
        if report.reconciliation is not None:
            yield from _reconciliation_families(report.reconciliation)
        if report.state_saved_s is not None:
            yield GaugeMetricFamily(
                "tcpexporter_state_saved_timestamp_seconds",
                "Time when connection ages were last saved (--state); 0 before that.",
                report.state_saved_s,
            )


def _namespaces(*series: Series) -> Iterator[int]:
    """Yield the inodes of the namespaces of series, each once."""
    yield from np.unique(np.concatenate(series).view(SERIES)["netns"]).tolist()


def _labels(series: Series, names: Mapping[int, str] | None) -> list[Labels]:
    """Return the label values of each series, with its namespace if there are ``names``."""
    rows = series.view(SERIES).tolist()
    ports: list[Labels] = [
        (str(port or "other"), str(ip_version)) for ip_version, port, _ in rows
    ]
    if names is None:
        return ports
    namespaces = [_netns(netns, port, names) for _, port, netns in rows]
    return [(*labels, netns) for labels, netns in zip(ports, namespaces, strict=True)]


def _netns(netns: int, port: int, names: Mapping[int, str]) -> str:
    return names.get(netns, str(netns)) if netns or port else "other"


def _reconciliation_families(done: Reconciliation) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "tcpexporter_reconciliations",
        "Comparisons of the tracked connections with the kernel's socket tables.",
        done.runs,
    )
    yield counter_by_label(
        "tcpexporter_corrections",
        "Connections added or removed by reconciliation after a missed event.",
        "kind",
        {"missed_open": done.missed_open, "missed_close": done.missed_close},
    )
    yield GaugeMetricFamily(
        "tcpexporter_reconcile_duration_seconds",
        "Duration of the last reconciliation.",
        done.duration_s,
    )
    yield GaugeMetricFamily(
        "tcpexporter_reconcile_interval_seconds",
        "Time between reconciliations if no event is missed; 0 if they run only after one.",
        done.interval_s,
    )
    yield GaugeMetricFamily(
        "tcpexporter_last_reconcile_timestamp_seconds",
        "Time when the last reconciliation ended or was found unnecessary; 0 before that.",
        done.finished_s,
    )


def make_registry(collector: ConnectionCollector) -> CollectorRegistry:
    """Return a registry of the connections and the version, as ``--once`` prints them.

    It has no ``process_*`` metrics. node_exporter has them too, and its textfile collector
    refuses a file with a metric that node_exporter already has.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    registry.register(BuildCollector())
    return registry


def make_serving_registry(
    collector: ConnectionCollector,
    reloads: Reloads,
    *,
    tasks: Callable[[], Iterable[Task]],
    dropped: Callable[[], int],
) -> CollectorRegistry:
    """Return a registry for scrapes. It also has reloads, background tasks and the process.

    Args:
        collector: the collector of the connections.
        reloads: the results of reloads.
        tasks: a function that returns the background tasks.
        dropped: a function that returns the number of dropped log lines.
    """
    registry = make_registry(collector)
    registry.register(ReloadCollector(reloads))
    registry.register(BackgroundCollector(tasks, dropped))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry
