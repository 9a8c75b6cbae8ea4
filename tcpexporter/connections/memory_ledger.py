# SPDX-License-Identifier: GPL-3.0-only
"""Numbers series and keeps their ledger in memory, for sources without a BPF program."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.identity import client_hashes
from tcpexporter.connections.parts import SERIES_FIRST, TIME_SHIFT, Parts, time_units
from tcpexporter.connections.record import SERIES_BITS, Numbers, Records, Words, words
from tcpexporter.connections.record import numbers as numbers_of
from tcpexporter.connections.series import (
    NO_SERIES,
    Forgotten,
    Ledger,
    Series,
    bucket_count,
    folded_number,
    folded_series,
    series_of,
)
from tcpexporter.connections.sets import distinct, find

CAPACITY = (1 << SERIES_BITS) - SERIES_FIRST
"""How many series can be counted separately."""

OPENED, CLOSED, PRE_EXISTING, LIFETIMES_SUM, BUCKETS = range(5)
"""The columns of the ledger; `BUCKETS` is the first column of the lifetimes by bucket."""


class MemoryLedger:
    """The series of connections, by number, and what has happened in each of them.

    A number is an index of the arrays. A series keeps it until `drop_forgotten` frees it.
    """

    def __init__(self, parts: Parts, bounds_s: Sequence[float] = ()) -> None:
        """Begin with no connection.

        Args:
            parts: what is counted separately.
            bounds_s: the upper bounds of all lifetime buckets except the last, in seconds,
                ascending; empty: lifetimes are not counted.
        """
        self._parts = parts
        self._bounds = np.array([time_units(each) for each in bounds_s])
        self._series = folded_series()
        columns = BUCKETS + bucket_count(bounds_s)
        self._rows = np.zeros((SERIES_FIRST, columns), np.int64)
        """What has happened in each series; of shape (numbers, columns)."""
        self._forgotten = Forgotten()

    def forget(self, field: str, values: Iterable[int]) -> None:
        """Forget series when `drop_forgotten` is called next; any thread may call this.

        Args:
            field: ``netns`` or ``cgroup``.
            values: the values of this field in the series to forget.
        """
        self._forgotten.add(field, values)

    @contextlib.contextmanager
    def unchanged_on_failure(self) -> Iterator[None]:
        """Undo what the block changes, if it fails. The block can then be repeated."""
        before = self._series, self._rows
        self._series, self._rows = self._series.copy(), self._rows.copy()
        try:
            with self._forgotten.restored_on_failure():
                yield
        except BaseException:
            self._series, self._rows = before
            raise

    def count(self, connections: Records) -> Chunk:
        """Return the words and clients of connections of dtype `SOCKET`."""
        numbers = self._numbers(series_of(connections, self._parts))
        masks = self._parts.client_masks
        return Chunk(
            words(numbers, connections["established_ns"]),
            client_hashes(connections["key"], masks) if masks else None,
        )

    def record_pre_existing(self, open_now: Words) -> None:
        """Record pre-existing connections: those that the first poll found."""
        np.add.at(self._rows[:, PRE_EXISTING], numbers_of(open_now), 1)

    def record_opened(self, opened: Words) -> None:
        """Record connections that were opened."""
        np.add.at(self._rows[:, OPENED], numbers_of(opened), 1)

    def record_closed(self, closed: Words, now_ns: int) -> None:
        """Record connections that had closed by a time on CLOCK_BOOTTIME."""
        numbers = numbers_of(closed)
        np.add.at(self._rows[:, CLOSED], numbers, 1)
        if len(self._bounds):
            established = (closed >> np.uint64(SERIES_BITS)).astype(np.int64)
            lifetimes = np.maximum((now_ns >> TIME_SHIFT) - established, 0)
            np.add.at(self._rows[:, LIFETIMES_SUM], numbers, lifetimes)
            buckets = np.searchsorted(self._bounds, lifetimes)
            np.add.at(self._rows[:, BUCKETS:], (numbers, buckets), 1)

    def snapshot(self) -> Ledger:
        """Return a copy of the ledger; ``failed`` is 0: attempts are not counted."""
        rows = self._rows.copy()
        failed = np.zeros(len(rows), np.int64)
        return Ledger(
            series=self._series.copy(),
            opened=rows[:, OPENED],
            closed=rows[:, CLOSED],
            failed=failed,
            pre_existing=rows[:, PRE_EXISTING],
            lifetimes_sum=rows[:, LIFETIMES_SUM],
            lifetimes=rows[:, BUCKETS:],
        )

    def drop_forgotten(self, open_now: Words) -> None:
        """Free the numbers of series that are to be forgotten, unless connections use them.

        Args:
            open_now: the present connections.
        """
        is_dropped = self._forgotten.take(self._series)
        is_dropped[numbers_of(open_now)] = False
        is_dropped[:SERIES_FIRST] = False
        self._series[is_dropped] = NO_SERIES
        self._rows[is_dropped] = 0

    def _numbers(self, series: Series) -> Numbers:
        """Return the number of each series, and allocate those that are missing."""
        wanted = distinct(series)
        new = np.setdiff1d(wanted, self._series, assume_unique=True)
        # Number 0 has no series and is never free.
        free = np.flatnonzero(self._series == NO_SERIES)[1 : len(new) + 1]
        added = new[len(free) :][: CAPACITY + SERIES_FIRST - len(self._series)]
        numbered = np.concatenate((self._series, added))
        numbered[free] = new[: len(free)]
        rows = np.zeros((len(added), self._rows.shape[1]), np.int64)
        # Both are assigned after both are made: their lengths must always be equal.
        self._rows, self._series = np.concatenate((self._rows, rows)), numbered
        order = np.argsort(self._series, kind="stable")
        at, is_known = find(self._series[order], wanted)
        number = np.where(is_known, order[at], folded_number(wanted))
        found: Numbers = number[np.searchsorted(wanted, series)].astype(np.uint32)
        return found
