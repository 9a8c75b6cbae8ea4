# SPDX-License-Identifier: GPL-3.0-only
"""Counts connections by series number, and adds up the series that have equal labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk, ClientCounts, SeenClients
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import LISTENER, Records
from tcpexporter.connections.selection import (
    Cgroups,
    Selection,
    is_selected,
    listened,
    owners_of,
    projected,
)
from tcpexporter.connections.series import NO_SERIES, SERIES_BYTES, Ledger, Series
from tcpexporter.connections.slot_counts import Counters, SlotCounts


@dataclass(frozen=True)
class Values:
    """What is published of each series; all arrays have one row for each series."""

    established: Counters
    """Connections that are established now."""
    ages: Counters
    """How many of them are at least as old as each bound; of shape (series, bounds)."""
    ages_sum: Counters
    """The sum of their ages, in units of 2^13 ns; 0 if ages are not counted."""
    opened: Counters
    closed: Counters
    failed: Counters
    pre_existing: Counters
    lifetimes_sum: Counters
    lifetimes: Counters
    """As in `Ledger`."""

    def summed(self, place: npt.NDArray[np.intp], size: int) -> "Values":
        """Return, for each place below ``size``, the sums of the rows that belong there."""
        is_distinct = bool(np.bincount(place, minlength=size).max(initial=0) <= 1)
        return Values(
            *(
                _sums(place, getattr(self, each.name), size, is_distinct=is_distinct)
                for each in fields(self)
            )
        )

    def is_used(self) -> npt.NDArray[np.bool_]:
        """Return which rows have, or once had, a connection or an attempt."""
        counted = self.established | self.opened | self.closed | self.failed
        used: npt.NDArray[np.bool_] = (counted | self.pre_existing) != 0
        return used

    def only(self, chosen: npt.NDArray[Any]) -> "Values":
        """Return the chosen rows."""
        return Values(*(getattr(self, each.name)[chosen] for each in fields(self)))


@dataclass(frozen=True)
class Counts:
    """What is published of all series."""

    series: Series
    """In ascending order."""
    values: Values
    total: int
    """All connections that were read, selected or not."""
    rows: npt.NDArray[np.int64]
    """For each series number, the index of its series; -1: it is not counted."""
    seen: SeenClients | None = None
    """The clients of all connections; None: clients are not counted. Valid until the next
    scrape."""

    def only(self, chosen: npt.NDArray[np.intp]) -> "Counts":
        """Return the chosen series; they are in ascending order."""
        if len(chosen) == len(self.series):
            return self
        place = np.full(len(self.series), -1)
        place[chosen] = np.arange(len(chosen))
        values = self.values.only(chosen)
        return Counts(self.series[chosen], values, self.total, self._rows(place), self.seen)

    def moved(self, series: Series, place: npt.NDArray[np.intp]) -> "Counts":
        """Return the counts by other series.

        Args:
            series: the other series, in ascending order.
            place: for each present series, the index of the one that it is added to.
        """
        if np.array_equal(series, self.series):
            return self
        values = self.values.summed(place, len(series))
        return Counts(series, values, self.total, self._rows(place), self.seen)

    def _rows(self, place: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return np.append(place, -1)[self.rows]  # the index -1 selects the appended -1

    def clients(self) -> ClientCounts | None:
        """Return the distinct clients of each series; None: they are not counted."""
        if self.seen is None:
            return None
        return self.seen.counts(self.rows, len(self.series))


class Projection:
    """Adds up the series that are equal when only the labels of a selection are compared.

    It keeps what depends only on the series and on which of them are used: both rarely
    change from scrape to scrape.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._series: Series = np.empty(0, SERIES_BYTES)
        self._used: npt.NDArray[np.bool_] = np.empty(0, np.bool_)
        self._owners: Cgroups = np.empty(0, np.uint64)
        self._chosen: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._merged: Series = np.empty(0, SERIES_BYTES)
        self._place: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._rows: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._listeners: Records = np.empty(0, LISTENER)
        self._listened = listened(self._listeners, selection)

    def of(
        self, series: Series, values: Values, *, total: int, seen: SeenClients | None
    ) -> Counts:
        """Return the counts of the series that have, or once had, a connection or attempt.

        Args:
            series: of each number; `NO_SERIES`: the number is free.
            values: of each number.
            total: as in `Counts`.
            seen: as in `Counts`.
        """
        owners = owners_of(series, self.selection)
        used = values.is_used()
        if not (
            np.array_equal(series, self._series)
            and np.array_equal(used, self._used)
            and np.array_equal(owners, self._owners)
        ):
            chosen = np.flatnonzero(used & is_selected(series, self.selection))
            merged, place = np.unique(
                projected(series[chosen], self.selection), return_inverse=True
            )
            rows = np.full(len(series), -1)
            rows[chosen] = place
            if len(merged) == len(chosen):
                # Each series has one number: sort the numbers by series, add nothing up.
                chosen, place = chosen[np.argsort(place)], place[:0]
            # All at once: the statements above may fail for lack of memory.
            self._chosen, self._merged, self._place = chosen, merged, place
            self._rows, self._series, self._used, self._owners = rows, series, used, owners
        values = values.only(self._chosen)
        if len(self._merged) < len(self._chosen):
            values = values.summed(self._place, len(self._merged))
        return Counts(self._merged, values, total, self._rows, seen)

    def listened(self, listeners: Records) -> Series:
        """Return the selected series of ``listeners``, of dtype `LISTENER`.

        The array is that of the previous call, if nothing has changed.
        """
        # The source returns the same array while no listener changes. The owner of a
        # cgroup may become known later.
        if listeners is not self._listeners or self.selection.by_owner:
            found = listened(listeners, self.selection)
            if not np.array_equal(found, self._listened):
                self._listened = found
            self._listeners = listeners
        return self._listened


def count(
    chunks: Iterable[Chunk],
    ledger: Callable[[], Ledger],
    slots: SlotCounts,
    projection: Projection,
    since_ns: Sequence[int],
    *,
    now_ns: int | None = None,
    long_term_ns: int | None = None,
) -> Counts:
    """Count the selected connections of all chunks.

    Args:
        chunks: of slots, including those without a connection. Each chunk is used only
            until the next one is requested. The kernel may write to it meanwhile.
        ledger: called before the first chunk and after the last one; the second result has
            the series of all connections.
        slots: of the same source; what it keeps from scrape to scrape saves time only.
        projection: of the selection of connections that are counted.
        since_ns: times on CLOCK_BOOTTIME, the latest first. For each of them, `Values.ages`
            has how many connections were established then or before. No connection was
            before 0.
        now_ns: the present time on that clock, if ages are to be added up.
        long_term_ns: the one of ``since_ns`` that makes a connection long-term, if clients
            are to be counted.
    """
    before = ledger().series
    memory_barrier()
    reading = slots.read(chunks, since_ns, long_term_ns=long_term_ns)
    memory_barrier()
    entries = ledger()
    series = entries.series
    established = reading.established[: len(series)].copy()
    established[0] = 0
    younger = np.zeros((len(since_ns), len(series)), np.int64)
    for row, each in zip(younger, reading.younger, strict=True):
        counted = each[: len(series)]
        row[: len(counted)] = counted
    ages_sum = np.zeros(len(series), np.int64)
    if now_ns is not None:
        ages_sum = established * (now_ns >> TIME_SHIFT) - reading.times[: len(series)]
    # A number that was freed meanwhile, and may be that of another series now, had no
    # connection any more when it was freed.
    has_changed = before[: len(series)] != series[: len(before)]
    has_changed &= before[: len(series)] != NO_SERIES
    reused = np.flatnonzero(has_changed)
    established[reused] = younger[:, reused] = ages_sum[reused] = 0
    values = Values(
        established,
        (established - younger).T,
        ages_sum,
        entries.opened,
        entries.closed,
        entries.failed,
        entries.pre_existing,
        entries.lifetimes_sum,
        entries.lifetimes,
    )
    counts = projection.of(
        series, values, total=int(established.sum()), seen=reading.clients
    )
    if len(reused):
        rows = counts.rows.copy()
        rows[reused] = -1
        counts = replace(counts, rows=rows)
    return counts


def _sums(
    place: npt.NDArray[np.intp], rows: Counters, size: int, *, is_distinct: bool
) -> Counters:
    sums = np.zeros((size, *rows.shape[1:]), np.int64)
    if is_distinct:
        sums[place] = rows
    elif rows.size:
        np.add.at(sums, place, rows)
    return sums
