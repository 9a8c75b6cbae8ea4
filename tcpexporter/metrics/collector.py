# SPDX-License-Identifier: GPL-3.0-only
"""Collects the metrics: names, help texts, and values from a source of connections."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tcpexporter import clock
from tcpexporter.connections.counting import Counts, Projection, count
from tcpexporter.connections.expected import Rule
from tcpexporter.connections.folding import Folder
from tcpexporter.connections.parts import TIME_SHIFT, Direction
from tcpexporter.connections.selection import Selection, is_still_selected
from tcpexporter.connections.series import FOLDED, OUTBOUND, REMOTE_PORT, SERIES, Series
from tcpexporter.connections.sets import distinct, is_in
from tcpexporter.connections.slot_counts import Counters, SlotCounts
from tcpexporter.connections.source import Source
from tcpexporter.host.background import Task
from tcpexporter.metrics.client_families import client_families
from tcpexporter.metrics.expected_families import expected_families
from tcpexporter.metrics.exporter_status import (
    BackgroundCollector,
    BuildCollector,
    ReloadCollector,
)
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.metrics.owners import Owner, owner_of_unnamed
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.metrics.series_family import LabelSets, SeriesFamily, single_family
from tcpexporter.metrics.series_labels import Labels, label_values
from tcpexporter.metrics.source_families import source_families

OF_OUTBOUND = OUTBOUND | REMOTE_PORT
"""The flags of a series that has outbound connections only."""

FORGET_NS = 300_000_000_000
"""Time without a name, connection and listener after which a namespace loses its
series."""


class Choice(NamedTuple):
    """The selection of connections, as the settings in force define it."""

    selection: Selection
    named: Series
    """Series that exist from the first scrape on, and are never folded."""
    duration_s: int
    """Minimum age of a long-term connection, in seconds."""
    rules: Sequence[Rule] = ()
    """Connections that are expected."""


class ConnectionCollector(Collector):
    """Reads a source at each scrape; keeps what the next scrape does not need to repeat."""

    def __init__(
        self,
        source: Source,
        choice: Choice,
        *,
        max_series: int,
        names: Callable[[], Mapping[int, str]] | None = None,
        owners: OwnerNumbers | None = None,
        bounds_s: Sequence[float] = (),
        has_clients: bool = False,
        boottime_ns: Callable[[], int] = clock.boottime_ns,
    ) -> None:
        """Count the connections of a source.

        Args:
            source: Source of the connections.
            choice: Which connections to count, until `choose` replaces it.
            max_series: Maximum number of series that are not folded.
            names: Returns the names of namespaces by inode; None if series are not per
                namespace.
            owners: Returns the owners of cgroups; None: no label, rule or namespace name
                requires them.
            bounds_s: Bounds of the histograms of lifetimes and ages, ascending; empty:
                there are none.
            has_clients: Whether the source distinguishes clients.
            boottime_ns: Returns the time on the clock of ``established_ns``, in ns.
        """
        self.tracked: int | None = None
        """Number of tracked connections at the last scrape; None: no scrape yet."""
        self._source = source
        self._choice = self._published_by = choice
        self._max_series = max_series
        self._names = names
        self._owners = owners
        self._bounds_s = tuple(bounds_s)
        self._has_clients = has_clients
        self._boottime_ns = boottime_ns
        self._published = choice.named
        self._slots = SlotCounts()
        self._projection = Projection(choice.selection)
        self._folder = Folder()
        self._labelled_by: object = None
        self._label_sets = LabelSets((), ())
        self._gone_ns: dict[int, int] = {}
        self._forgotten: set[int] = set()
        self._names_before: Mapping[int, str] | None = None
        """The names at the last scrape; None: no scrape yet."""

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
        # The report is read before the connections: an exposition that shows the end
        # of a reconciliation must also show its corrections.
        report = self._source.report()
        ages_s = sorted({*self._bounds_s, choice.duration_s})
        since_ns = [now_ns - round(each * 1e9) for each in ages_s]
        long_term_ns = since_ns[ages_s.index(choice.duration_s)]
        counts = count(
            self._source.read(),
            self._source.ledger,
            self._slots,
            self._project(choice.selection),
            since_ns,
            now_ns=now_ns if self._bounds_s else None,
            long_term_ns=long_term_ns if self._has_clients else None,
        )
        self.tracked = counts.total
        names = self._names() if self._names else None
        counts, folded = self._publish(counts, choice, now_ns, names)
        yield from self._connection_families(counts, choice, ages_s, names or {})
        if self._owners and choice.selection.by_owner:
            yield _owner_info(self._owners, counts.series, self._max_series)
        yield single_family(
            "tcpexporter_duration_seconds",
            "Minimum age of a long-term TCP connection (--duration).",
            "gauge",
            choice.duration_s,
        )
        yield single_family(
            "tcpexporter_folded_series",
            'Series summed up in port="other" because there are more than --max-series.',
            "gauge",
            folded,
        )
        yield single_family(
            "tcpexporter_pre_existing_connections",
            "Connections that were open when counting began; summed over all series,"
            " opened - closed = established - this.",
            "gauge",
            int(counts.values.pre_existing.sum()),
        )
        yield from expected_families(self._source, choice.rules, long_term_ns, self._owners)
        if self._owners:
            self._source.forget("cgroup", self._owners.finish(now_ns))
        yield from source_families(self._source.name, report, counts.total)
        yield single_family(
            "tcpexporter_collect_duration_seconds",
            "Time needed to read and count the connections for this scrape.",
            "gauge",
            time.perf_counter() - started_s,
        )

    def _project(self, selection: Selection) -> Projection:
        if self._projection.selection is not selection:
            self._projection = Projection(selection)
        return self._projection

    def _publish(
        self,
        counts: Counts,
        choice: Choice,
        now_ns: int,
        names: Mapping[int, str] | None,
    ) -> tuple[Counts, int]:
        """Return the counts to publish and the number of folded series.

        The counts include the series that were published before.
        """
        selection = choice.selection
        listening = (
            self._project(selection).listened(self._source.listeners())
            if selection.labels
            else choice.named
        )
        if choice is not self._published_by:
            still = is_still_selected(self._published, selection)
            self._published = self._published[still]
            self._published_by = choice
        if self._owners and selection.by_owner:
            known = self._owners.is_known(self._published.view(SERIES)["cgroup"])
            if not known.all():
                self._published = self._published[known]
        if names is not None:
            present = counts.series[counts.values.established != 0]
            self._forget_renamed(names)
            self._forget_gone({*names, *_namespaces(present, listening)}, now_ns)
            counts = self._without_forgotten(counts)
        exposition, folded = self._folder.fold(
            counts,
            listening=listening,
            named=choice.named,
            published=self._published,
            max_series=self._max_series,
            selection=selection,
        )
        self._published = exposition.series
        return exposition, folded

    def _without_forgotten(self, counts: Counts) -> Counts:
        """Return the counts without series of forgotten namespaces without connection.

        The source forgets their counters a little later.
        """
        is_stale = is_in(counts.series.view(SERIES)["netns"], [*self._forgotten])
        is_stale &= counts.values.established == 0
        self._forgotten &= {*_namespaces(counts.series[is_stale])}
        return counts.only(np.flatnonzero(~is_stale))

    def _forget_renamed(self, names: Mapping[int, str]) -> None:
        """Forget the series of namespaces whose name has changed or is gone.

        The kernel reuses inodes, so a new namespace with other ports may have that inode
        now.
        """
        before, self._names_before = self._names_before, dict(names)
        if before is None:
            return
        renamed = [
            netns
            for netns in _namespaces(self._published)
            if names.get(netns) != before.get(netns)
        ]
        self._forget_series(renamed)

    def _forget_series(self, netns: Sequence[int]) -> None:
        if not netns:
            return
        self._forgotten |= {*netns}
        self._source.forget("netns", netns)
        is_forgotten = is_in(self._published.view(SERIES)["netns"], netns)
        self._published = self._published[~is_forgotten]

    def _forget_gone(self, present: set[int], now_ns: int) -> None:
        """Forget the series of namespaces that have been gone for FORGET_NS."""
        gone = {*_namespaces(self._published)} - {*present, 0}
        self._gone_ns = {netns: self._gone_ns.get(netns, now_ns) for netns in gone}
        expired = [
            netns for netns, since in self._gone_ns.items() if now_ns - since > FORGET_NS
        ]
        self._forget_series(expired)

    def _connection_families(
        self,
        counts: Counts,
        choice: Choice,
        ages_s: Sequence[float],
        names: Mapping[int, str],
    ) -> Iterator[Metric]:
        labels = choice.selection.labels
        flags = counts.series.view(SERIES)["flags"]
        if Direction.OUTBOUND in choice.selection.directions:
            has_attempts = (counts.values.failed != 0) | (flags & OF_OUTBOUND != 0)
            attempts = counts.only(np.flatnonzero(has_attempts))
            yield SeriesFamily(
                "tcp_connections_failed",
                "Outbound TCP connection attempts that ended before ESTABLISHED.",
                "counter",
                LabelSets(labels, self._label_values(attempts.series, labels, names)),
                attempts.values.failed.tolist(),
            )
        if "port" in labels:
            # Attempts that have failed are the only ones without a port.
            has_port = (counts.series.view(SERIES)["port"] != 0) | (flags & FOLDED != 0)
            counts = counts.only(np.flatnonzero(has_port))
        values = counts.values
        label_sets = self._labels(counts.series, labels, names)
        long_term = values.ages[:, ages_s.index(choice.duration_s)]
        families = (
            (
                "netstat_tcp_longterm_connections_total",
                "TCP connections established for at least tcpexporter_duration_seconds.",
                "gauge",
                long_term,
            ),
            (
                "tcp_established_connections",
                "TCP connections that are established, of any age.",
                "gauge",
                values.established,
            ),
            (
                "tcp_connections_opened",
                "TCP connections that were established since counting began.",
                "counter",
                values.opened,
            ),
            (
                "tcp_connections_closed",
                "TCP connections that left the state ESTABLISHED since counting began.",
                "counter",
                values.closed,
            ),
        )
        for name, text, kind, numbers in families:
            yield SeriesFamily(name, text, kind, label_sets, numbers.tolist())
        if clients := counts.clients():
            yield from client_families(clients, label_sets)
        if self._bounds_s:
            chosen = [ages_s.index(each) for each in self._bounds_s]
            yield self._lifetimes(counts, label_sets)
            yield self._ages(counts, label_sets, values.ages[:, chosen])

    def _labels(
        self, series: Series, labels: Sequence[str], names: Mapping[int, str]
    ) -> LabelSets:
        """Return the labels of series; the same object as before if nothing has changed."""
        key = (series.tobytes(), tuple(names.items()))
        if key != self._labelled_by:
            self._label_sets = LabelSets(labels, self._label_values(series, labels, names))
            self._labelled_by = key
        return self._label_sets

    def _label_values(
        self, series: Series, labels: Sequence[str], names: Mapping[int, str]
    ) -> list[Labels]:
        owner = self._owners.of if self._owners else owner_of_unnamed
        return label_values(series, labels, names, owner)

    def _lifetimes(self, counts: Counts, labels: LabelSets) -> Metric:
        family = HistogramMetricFamily(
            "tcp_connection_duration_seconds",
            "How long closed TCP connections were established; long-lived ones appear here"
            " only when they close.",
            labels=labels.names,
        )
        values = counts.values
        cumulative = values.lifetimes.cumsum(axis=1)
        for row, each, total in zip(
            labels.rows, cumulative, values.lifetimes_sum, strict=True
        ):
            family.add_metric(row, self._buckets(each), _seconds(total))
        return family

    def _ages(self, counts: Counts, labels: LabelSets, older: Counters) -> Metric:
        family = GaugeHistogramMetricFamily(
            "tcp_established_connection_age_seconds",
            "For how long the open TCP connections have been established.",
            labels=labels.names,
        )
        values = counts.values
        cumulative = np.column_stack(
            (values.established[:, np.newaxis] - older, values.established)
        )
        for row, each, total in zip(labels.rows, cumulative, values.ages_sum, strict=True):
            family.add_metric(row, self._buckets(each), _seconds(total))
        return family

    def _buckets(self, cumulative: Counters) -> list[tuple[str, float]]:
        bounds = [*map(floatToGoString, self._bounds_s), "+Inf"]
        return list(zip(bounds, cumulative.tolist(), strict=True))


def _namespaces(*series: Series) -> Iterator[int]:
    """Yield the inodes of the namespaces of series, each once."""
    yield from distinct(*(each.view(SERIES)["netns"] for each in series)).tolist()


def _owner_info(owners: OwnerNumbers, series: Series, limit: int) -> Metric:
    family = GaugeMetricFamily(
        "tcpexporter_owner_info",
        "Owners of TCP connections, for joins; cgroup is the path of the owner's cgroup.",
        labels=Owner._fields,
    )
    numbers = {*distinct(series.view(SERIES)["cgroup"]).tolist()}
    for each in itertools.islice(owners.present(numbers), limit):
        family.add_metric(each, 1)
    return family


def _seconds(units: np.int64) -> float:
    return float(int(units) << TIME_SHIFT) / 1e9


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
    """Return a registry for scrapes. It also has metrics of the process.

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
