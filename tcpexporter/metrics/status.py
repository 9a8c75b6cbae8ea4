# SPDX-License-Identifier: GPL-3.0-only
"""Derives the rows and the tiles of the status page from a collection and the history."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from prometheus_client import Metric

from tcpexporter.connections.slot_counts import Counters
from tcpexporter.metrics.history import History
from tcpexporter.metrics.series_family import LabelSets, SeriesFamily

MAX_ROWS = 2_000
"""The status page shows this many series at most, those with most connections."""

ESTABLISHED = "tcp_established_connections"
LONG_TERM = "netstat_tcp_longterm_connections_total"
CLIENTS = "tcp_established_clients"
LONG_TERM_CLIENTS = "tcp_longterm_clients"
OPENED = "tcp_connections_opened"
CLOSED = "tcp_connections_closed"
AGES = "tcp_established_connection_age_seconds"

_SERIES = (ESTABLISHED, LONG_TERM, CLIENTS, OPENED, CLOSED)

_UNCERTAIN = "tcpexporter_uncertain_connections"
_COMPARED = "tcpexporter_last_reconcile_timestamp_seconds"
_DURATION = "tcpexporter_duration_seconds"
_FOLDED = "tcpexporter_folded_series"
_SOURCE = "tcpexporter_source"
_EXPECTED = {
    "tcp_expected_connections": "connections",
    "tcp_expected_longterm_connections": "long-term connections",
    "tcp_expected_minimum": "minimum",
}

_TOOK = "tcpexporter_collect_duration_seconds"

_FACTS = (_UNCERTAIN, _COMPARED, _DURATION, _FOLDED, _SOURCE, _TOOK, *_EXPECTED)


@dataclass(frozen=True)
class Collected:
    """What the status page needs of one collection."""

    labels: LabelSets
    numbers: Mapping[str, Sequence[int]]
    """The values of each series, by metric family. Some sources lack some families."""
    bounds: Sequence[str]
    """The upper bounds of the histogram of ages, in seconds; empty: there is none."""
    ages: Counters
    """The cumulative buckets: a row for each series, a column for each bound."""
    facts: Mapping[str, Mapping[str, float]]
    """The values of other metric families, by the value of their only label; "" if none."""

    @property
    def took_s(self) -> float:
        """The duration of the collection, in seconds; 0 if it is not published."""
        return self.facts.get(_TOOK, {}).get("", 0.0)

    def of(self, name: str) -> Sequence[int]:
        """Return the numbers of a metric family; 0 for each series if it is missing."""
        return self.numbers.get(name, [0] * len(self.labels.rows))


class Expected(NamedTuple):
    """Connections that an operator expects (--expect)."""

    name: str
    established: int
    long_term: int
    minimum: int

    @property
    def is_met(self) -> bool:
        """Whether there are at least as many long-term connections as the rule requires."""
        return self.long_term >= self.minimum


class Row(NamedTuple):
    """One series."""

    labels: Sequence[str]
    established: int
    long_term: int
    clients: int | None
    """None: clients are not counted."""
    opened_per_minute: float
    closed_per_minute: float
    ages: Sequence[int]
    """The connections of each age segment, the youngest first."""
    history: str
    """The last 15 minutes, as `History.past` describes it."""
    largest: int
    """The number of connections at the highest level of ``history``."""


@dataclass(frozen=True)
class Status:
    """What the status page shows."""

    source: str
    connections: int
    long_term: int
    clients: int | None
    """The sum over all series: a client of two series counts twice. None: not counted."""
    duration_s: int
    uncertain: int | None
    """None: the source does not count missed events."""
    compared_s: float | None
    """When numbers were last compared with the kernel's, in Unix time (s); None: never."""
    expected: Sequence[Expected]
    labels: Sequence[str]
    age_segments: Sequence[str]
    """What each age segment contains: "younger than 60 s"."""
    rows: Sequence[Row]
    left_out: int
    """Series that `MAX_ROWS` leaves out."""
    folded: int


def read(families: Iterable[Metric]) -> Collected:
    """Return what the status page needs of the metric families of one collection."""
    labels = LabelSets((), ())
    numbers: dict[str, Sequence[int]] = {}
    bounds: Sequence[str] = ()
    ages: Counters = np.zeros((0, 0), np.int64)
    facts: dict[str, Mapping[str, float]] = {}
    for family in families:
        if isinstance(family, SeriesFamily) and family.name in _SERIES:
            numbers[family.name] = family.numbers
            labels = family.labels
        elif family.name == AGES:
            bounds, ages = _read_ages(family)
        elif family.name in _FACTS:
            facts[family.name] = {
                next(iter(each.labels.values()), ""): each.value for each in family.samples
            }
    return Collected(labels, numbers, bounds, ages, facts)


def _read_ages(
    family: Metric,
) -> tuple[Sequence[str], Counters]:
    """Return the bounds and the buckets; all series have equal bounds, in one order."""
    bounds: dict[str, None] = {}
    values = []
    for each in family.samples:
        if each.name.endswith("_bucket"):
            bounds[each.labels["le"]] = None
            values.append(each.value)
    return [*bounds], np.array(values, np.int64).reshape(-1, max(len(bounds), 1))


def sample(collected: Collected, history: History, now_s: float) -> None:
    """Add a collection to the history, unless that has a sample in this time slot."""
    if history.is_due(now_s):
        counters = (collected.of(each) for each in (ESTABLISHED, OPENED, CLOSED))
        history.add(now_s, collected.labels, *counters)


def summarize(collected: Collected, history: History, now_s: float) -> Status:
    """Return what the status page shows.

    Args:
        collected: the values of the last collection.
        history: the history, with a sample of that collection or of one before it.
        now_s: the time of the collection in seconds, on the clock of ``history``.
    """
    facts = collected.facts
    established, long_term = collected.of(ESTABLISHED), collected.of(LONG_TERM)
    clients = collected.numbers.get(CLIENTS)
    duration_s = int(facts.get(_DURATION, {}).get("", 0))
    rows = _rows(collected, history, now_s)
    uncertain = facts.get(_UNCERTAIN, {}).get("")
    return Status(
        source=next(iter(facts.get(_SOURCE, {"": 0}))),
        connections=sum(established),
        long_term=sum(long_term),
        clients=None if clients is None else sum(clients),
        duration_s=duration_s,
        uncertain=None if uncertain is None else int(uncertain),
        compared_s=facts.get(_COMPARED, {}).get("") or None,
        expected=_expected(facts),
        labels=list(collected.labels.names),
        age_segments=_segments(collected.bounds, duration_s),
        rows=rows,
        left_out=len(established) - len(rows),
        folded=int(facts.get(_FOLDED, {}).get("", 0)),
    )


def _rows(collected: Collected, history: History, now_s: float) -> list[Row]:
    labels = collected.labels
    established, long_term, opened, closed = (
        collected.of(each) for each in (ESTABLISHED, LONG_TERM, OPENED, CLOSED)
    )
    clients = collected.numbers.get(CLIENTS)
    rates = history.rates(now_s, labels, established, opened, closed)
    order = sorted(range(len(labels.rows)), key=established.__getitem__, reverse=True)
    order = order[:MAX_ROWS]
    past = history.past(now_s, order)
    if collected.bounds:
        ages = np.diff(collected.ages, axis=1, prepend=0).tolist()
    else:
        ages = [[all_ - old, old] for all_, old in zip(established, long_term, strict=True)]
    return [
        Row(
            labels.rows[each],
            established[each],
            long_term[each],
            None if clients is None else clients[each],
            rates.opened[each],
            rates.closed[each],
            ages[each],
            levels,
            largest,
        )
        for each, levels, largest in zip(order, past.levels, past.largest, strict=True)
    ]


def _segments(bounds: Sequence[str], duration_s: int) -> list[str]:
    if not bounds:
        return [f"younger than {duration_s} s", f"{duration_s} s and older (long-term)"]
    ends = [float(each) for each in bounds]
    return [f"younger than {ends[0]:g} s"] + [
        f"{start:g} s and older" if math.isinf(end) else f"{start:g} s to {end:g} s"
        for start, end in itertools.pairwise(ends)
    ]


def _expected(facts: Mapping[str, Mapping[str, float]]) -> list[Expected]:
    """Return expected connections, sorted by name, with those that are missing first."""
    established, long_term, minimum = (facts.get(each, {}) for each in _EXPECTED)
    found = [
        Expected(
            name, int(established.get(name, 0)), int(long_term.get(name, 0)), int(least)
        )
        for name, least in minimum.items()
    ]
    return sorted(found, key=lambda each: (each.is_met, each.name))
