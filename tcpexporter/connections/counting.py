# SPDX-License-Identifier: GPL-3.0-only
"""Counts connections by series number, and adds up the series that have equal labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk, ClientCounts, Seen, count_clients
from tcpexporter.connections.clients import seen as clients_of
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.record import CLOSED, SERIES_BITS, SERIES_MASK, TIME_SHIFT
from tcpexporter.connections.selection import (
    Cgroups,
    Selection,
    is_selected,
    owners_of,
    projected,
)
from tcpexporter.connections.series import NO_SERIES, SERIES_BYTES, Ledger, Series

Counters = npt.NDArray[np.int64]

ONE = np.int32(1)
"""1 in the dtype of the counters: np.add.at is forty times as fast with equal dtypes."""

NUMBERS = 1 << SERIES_BITS
"""How many series numbers a connection can have; number 0 is that of no connection."""

PIECE = 32768
"""Number of connections that are counted at once: they fit into the cache of a CPU."""


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
    seen: Sequence[Seen] | None = None
    """The clients of all connections, in pieces; None: clients are not counted."""

    def only(self, chosen: npt.NDArray[np.intp]) -> "Counts":
        """Return the chosen series."""
        place = np.full(len(self.series), -1)
        place[chosen] = np.arange(len(chosen))
        values = self.values.only(chosen)
        return Counts(self.series[chosen], values, self.total, self._rows(place), self.seen)

    def moved(self, series: Series, place: npt.NDArray[np.intp]) -> "Counts":
        """Return the sums by other series; ``place`` has the index of each present one."""
        values = self.values.summed(place, len(series))
        return Counts(series, values, self.total, self._rows(place), self.seen)

    def _rows(self, place: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return np.where(self.rows >= 0, np.append(place, -1)[self.rows], -1)

    def clients(self) -> ClientCounts | None:
        """Return the distinct clients of each series; None: they are not counted."""
        if self.seen is None:
            return None
        return count_clients(self.seen, self.rows, len(self.series))


class Projection:
    """Adds up the series that are equal when only the labels of a selection are compared.

    It keeps what depends on the series alone: from scrape to scrape, they rarely change.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._series: Series = np.empty(0, SERIES_BYTES)
        self._owners: Cgroups = np.empty(0, np.uint64)
        self._chosen: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._merged: Series = np.empty(0, SERIES_BYTES)
        self._place: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._rows: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def of(
        self, series: Series, values: Values, *, total: int, seen: Sequence[Seen] | None
    ) -> Counts:
        """Return the counts of the series in use.

        Args:
            series: of each number; `NO_SERIES`: the number is free.
            values: of each number.
            total: as in `Counts`.
            seen: as in `Counts`.
        """
        owners = owners_of(series, self.selection)
        if not (
            np.array_equal(series, self._series) and np.array_equal(owners, self._owners)
        ):
            self._series, self._owners = series, owners
            self._chosen = np.flatnonzero(is_selected(series, self.selection))
            self._merged, self._place = np.unique(
                projected(series[self._chosen], self.selection), return_inverse=True
            )
            self._rows = np.full(len(series), -1)
            self._rows[self._chosen] = self._place
        summed = values.only(self._chosen).summed(self._place, len(self._merged))
        counts = Counts(self._merged, summed, total, self._rows, seen)
        is_used = summed.established | summed.opened | summed.failed | summed.pre_existing
        used = np.flatnonzero(is_used)
        return counts if len(used) == len(self._merged) else counts.only(used)


def count(
    chunks: Iterable[Chunk],
    ledger: Callable[[], Ledger],
    projection: Projection,
    since_ns: Sequence[int],
    *,
    now_ns: int | None = None,
    long_term_ns: int | None = None,
) -> Counts:
    """Count the selected connections of all chunks.

    Args:
        chunks: of slots, with those without a connection. Each chunk is used only until the
            next one is requested. The kernel may write to it meanwhile.
        ledger: called when all chunks have been counted: so it has all their series.
        projection: of the selection of connections that are counted.
        since_ns: times on CLOCK_BOOTTIME, the latest first. For each of them, `Values.ages`
            has how many connections were established then or before. None was before 0.
        now_ns: the present time on that clock, if ages are to be added up.
        long_term_ns: the one of ``since_ns`` that makes a connection long-term, if clients
            are to be counted.
    """
    before = ledger().series
    memory_barrier()
    pieces = _copies(chunks)
    seen: list[Seen] | None = None
    if long_term_ns is not None:
        seen, limit = [], first_young(long_term_ns)
        pieces = _gathering(pieces, seen, limit)
    bins, times = _tally(pieces, since_ns, has_sums=now_ns is not None)
    memory_barrier()
    entries = ledger()
    series = entries.series
    counted = bins[:, : len(series)].astype(np.int64)
    # A number that was freed meanwhile, and may be that of another series now, had no
    # connection any more when it was freed.
    has_changed = before[: len(series)] != series[: len(before)]
    has_changed &= before[: len(series)] != NO_SERIES
    counted[:, np.flatnonzero(has_changed)] = 0
    established, younger = counted[0], counted[1:]
    ages_sum = np.zeros(len(series), np.int64)
    if now_ns is not None:
        ages_sum = established * (now_ns >> TIME_SHIFT) - times[: len(series)]
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
    total = int(established[1:].sum())
    return projection.of(series, values, total=total, seen=seen)


def _copies(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield copies of all slots, in pieces; each is valid until the next one is requested.

    All pieces use the same memory: after large arrays have been freed, glibc returns their
    memory to the kernel, and then each new page costs a page fault.
    """
    copies = np.empty((2, PIECE), np.uint64)
    for words, clients in chunks:
        for first in range(0, len(words), PIECE):
            piece = words[first : first + PIECE]
            copied, of = copies[:, : len(piece)]
            np.copyto(copied, piece)
            if clients is None:
                yield Chunk(copied)
                continue
            memory_barrier()
            np.copyto(of, clients[first : first + PIECE])
            memory_barrier()
            # A slot whose word has changed may have the client of another connection.
            copied[np.flatnonzero(piece != copied)] = CLOSED
            yield Chunk(copied, of)


def _gathering(
    pieces: Iterable[Chunk], into: list[Seen], limit: np.uint64
) -> Iterator[Chunk]:
    """Yield all pieces, and append their clients to ``into``."""
    for words, clients in pieces:
        if clients is not None:
            into.append(clients_of(words, clients, limit))
        yield Chunk(words, clients)


def first_young(since_ns: int) -> np.uint64:
    """Return the lowest word of a connection that was established after this time."""
    return np.uint64((since_ns >> TIME_SHIFT) + 1 << SERIES_BITS if since_ns >= 0 else 0)


def _tally(
    pieces: Iterable[Chunk], since_ns: Sequence[int], *, has_sums: bool
) -> tuple[npt.NDArray[np.int32], Counters]:
    """Count the connections of each series number by age, and add up their times.

    It neither sorts nor loops over connections in Python. It requires the same time for any
    number of series. Each connection is read once, as one word; those that are as old as
    the last bound are not looked at again.

    Returns:
        The number of all connections, and of those that are younger than each bound, of
        shape (bounds + 1, `NUMBERS`); and, for each number, the sum of the times at which
        its connections were established, in units of 2^13 ns. Pages that are never written
        to take no memory.
    """
    limits = [first_young(each) for each in since_ns]
    bins = np.zeros((len(limits) + 1, NUMBERS), np.int32)
    times = np.zeros(NUMBERS, np.int64)
    found, is_young = np.empty(PIECE, np.uint64), np.empty(PIECE, np.bool_)
    for piece, _ in pieces:
        words, masked = piece, found[: len(piece)]
        np.bitwise_and(words, np.uint64(SERIES_MASK), out=masked)
        numbers = masked.view(np.int64)
        np.add.at(bins[0], numbers, ONE)
        if has_sums:
            np.add.at(times, numbers, (words >> np.uint64(SERIES_BITS)).view(np.int64))
        # The last bound first: only some of these are younger than an earlier bound.
        for limit, younger in zip(reversed(limits), bins[:0:-1], strict=True):
            np.greater_equal(words, limit, out=is_young[: len(words)])
            chosen = np.flatnonzero(is_young[: len(words)])
            if not len(chosen):
                break
            words, numbers = words[chosen], numbers[chosen]
            np.add.at(younger, numbers, ONE)
    return bins, times


def _sums(
    place: npt.NDArray[np.intp], rows: Counters, size: int, *, is_distinct: bool
) -> Counters:
    sums = np.zeros((size, *rows.shape[1:]), np.int64)
    if is_distinct:
        sums[place] = rows
    elif rows.size:
        np.add.at(sums, place, rows)
    return sums
