# SPDX-License-Identifier: GPL-3.0-only
"""What is published: metric names, help texts, and the collector that fills them."""

import platform
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

from tcpexporter import clock, version
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
from tcpexporter.metrics.reload_status import Reloads

PORT_LABELS = ("port", "tcp_version")

Labels: TypeAlias = tuple[str, ...]
"""The values of `PORT_LABELS`, and the name of the namespace where those are told apart."""

FORGET_NS = 300_000_000_000
"""How long a namespace without name, connection and listener keeps its series."""


class Choice(NamedTuple):
    """What is counted, of all connections there are."""

    selection: Selection
    named: Series
    """Series that are there from the first scrape on, stay, and are never folded."""
    duration_s: int
    """From what age on a connection is long-term."""


class ConnectionCollector(Collector):
    """Reads its source at each scrape; remembers only which series it has published."""

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
        """Count connections of ``source``.

        Args:
            source: where the connections come from.
            choice: which of them are counted, until `choose` says otherwise.
            max_series: how many ports' series a page has; the smallest of more are
                folded into one.
            names: of the namespaces there are, by inode, if they are told apart.
            simple: publish one number without labels.
            boottime_ns: the clock of ``established_ns``.
        """
        self.tracked: int | None = None
        """How many connections were known at the last scrape."""
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
        """Count that from the next scrape on; from any thread.

        What was published and is not in the selection any more is forgotten.
        """
        self._choice = choice

    def collect(self) -> Iterator[Metric]:
        """The metric families of one scrape.

        Raises:
            SourceError: the source cannot be read.
        """
        started_s = time.perf_counter()
        now_ns = self._boottime_ns()
        choice = self._choice
        since_ns = now_ns - choice.duration_s * 1_000_000_000
        names = self._names() if self._names else None
        # Before the connections: a page that says that a reconciliation has ended shows
        # what that has corrected.
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
            "TCP connections that are established, whatever their age.",
            labels,
            counts.established,
        )
        yield GaugeMetricFamily(
            "tcpexporter_duration_seconds",
            "Age from which a TCP connection is long-term, as --duration has it.",
            choice.duration_s,
        )
        yield GaugeMetricFamily(
            "tcpexporter_folded_series",
            'Series folded into port="other", because there are more than --max-series.',
            folded,
        )
        yield from self._about_the_source(report, counts.total)
        yield GaugeMetricFamily(
            "tcpexporter_collect_duration_seconds",
            "How long it took to read and count the connections for this page.",
            time.perf_counter() - started_s,
        )

    def _publish(
        self,
        counts: Counts,
        choice: Choice,
        now_ns: int,
        names: Mapping[int, str] | None,
    ) -> tuple[Counts, int]:
        """What is used now, and was published before, as far as there is room."""
        listening = listened(self._source.listeners(), choice.selection)
        if choice is not self._published_by:
            self._published = listened(self._published.view(SERIES), choice.selection)
            self._published_by = choice
        if names is not None:
            self._forget_renamed(names)
            self._forget({*names, *_namespaces(counts.series, listening)}, now_ns)
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
        """What is published of namespaces that have another name now, or none any more.

        It may be another namespace with the same inode, which has other ports.
        """
        before, self._names_before = self._names_before, dict(names)
        renamed = [
            netns
            for netns in _namespaces(self._published)
            if names.get(netns) != before.get(netns)
        ]
        self._leave_out(renamed)

    def _leave_out(self, netns: Sequence[int]) -> None:
        is_left_out = np.isin(self._published.view(SERIES)["netns"], netns)
        self._published = self._published[~is_left_out]

    def _forget(self, present: set[int], now_ns: int) -> None:
        """What is published of namespaces that have been gone for long."""
        gone = {*_namespaces(self._published)} - {*present, 0}
        self._gone_ns = {netns: self._gone_ns.get(netns, now_ns) for netns in gone}
        over = [
            netns for netns, since in self._gone_ns.items() if now_ns - since > FORGET_NS
        ]
        self._leave_out(over)

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

    def _about_the_source(self, report: Report, total: int) -> Iterator[Metric]:
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
        if report.max_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_max_connections",
                "TCP connections that there is room for.",
                report.max_connections,
            )
        if report.seeded_connections is not None:
            yield GaugeMetricFamily(
                "tcpexporter_seeded_connections",
                "Of the tracked connections, those older than this run of the exporter:"
                " their age is a lower bound, unless it was taken over.",
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
        if report.state_saved_s is not None:
            yield GaugeMetricFamily(
                "tcpexporter_state_saved_timestamp_seconds",
                "When the ages were last saved in the file of --state; 0: not yet.",
                report.state_saved_s,
            )


def _namespaces(*series: Series) -> Iterator[int]:
    """Each once."""
    yield from np.unique(np.concatenate(series).view(SERIES)["netns"]).tolist()


def _labels(series: Series, names: Mapping[int, str] | None) -> list[Labels]:
    """The values of each of ``series``, with its namespace if there are ``names``."""
    rows = series.view(SERIES).tolist()
    ports: list[Labels] = [
        (str(port or "other"), str(ip_version)) for ip_version, port, _ in rows
    ]
    if names is None:
        return ports
    where = [_netns(netns, port, names) for _, port, netns in rows]
    return [(*labels, netns) for labels, netns in zip(ports, where, strict=True)]


def _netns(netns: int, port: int, names: Mapping[int, str]) -> str:
    return names.get(netns, str(netns)) if netns or port else "other"


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


class ReloadCollector(Collector):
    """What came of reading the configuration again, with Prometheus' own names."""

    def __init__(self, reloads: Reloads) -> None:
        self._reloads = reloads

    def collect(self) -> Iterator[Metric]:
        """Two families, which are there before anything is read again, too."""
        yield GaugeMetricFamily(
            "tcpexporter_config_last_reload_successful",
            "Whether the settings and the web configuration that were read last are in"
            " force.",
            int(self._reloads.successful),
        )
        yield GaugeMetricFamily(
            "tcpexporter_config_last_reload_success_timestamp_seconds",
            "When what was read was in force last: at the start, or when read again.",
            self._reloads.succeeded_s,
        )


class ConfinementCollector(Collector):
    """What keeps the process from doing harm, as it was after the start."""

    def __init__(self, confined: Mapping[str, bool]) -> None:
        """Take what `confinement.confine` returned."""
        self._confined = confined

    def collect(self) -> Iterator[Metric]:
        """One family that never changes."""
        family = GaugeMetricFamily(
            "tcpexporter_confined",
            "Whether the serving process is confined in this way: 1 if so.",
            labels=["by"],
        )
        for by, is_in_force in self._confined.items():
            family.add_metric([by], is_in_force)
        yield family


class BackgroundCollector(Collector):
    """How the background threads are doing, and the log."""

    def __init__(
        self, tasks: Callable[[], Iterable[Task]], dropped: Callable[[], int]
    ) -> None:
        """Ask these at each scrape.

        Args:
            tasks: those there are.
            dropped: how many lines of the log were dropped.
        """
        self._tasks = tasks
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """Two families."""
        yield _by_label(
            "tcpexporter_background_failures",
            "Rounds of a background thread that failed, or were not over in time.",
            "task",
            {task.name: task.failures() for task in self._tasks()},
        )
        yield CounterMetricFamily(
            "tcpexporter_dropped_log_lines",
            "Lines of the log that standard error did not accept at once.",
            self._dropped(),
        )


def make_registry(collector: ConnectionCollector) -> CollectorRegistry:
    """What is on every page: the connections, and which exporter this is.

    node_exporter adds such a page to its own, which has ``process_*``: two of one name
    would be an error.
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
    """What a scrape shows: that, and what is about a process that keeps running.

    Args:
        collector: of the connections.
        reloads: what came of reading the configuration again.
        tasks: the background threads there are.
        dropped: how many lines of the log were dropped.
    """
    registry = make_registry(collector)
    registry.register(ReloadCollector(reloads))
    registry.register(BackgroundCollector(tasks, dropped))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry
