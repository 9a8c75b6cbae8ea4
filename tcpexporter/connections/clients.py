# SPDX-License-Identifier: GPL-3.0-only
"""Counts the distinct clients of each series."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import CLIENT_BITS, Clients
from tcpexporter.connections.record import SERIES_MASK, Words
from tcpexporter.connections.sets import distinct, find

ClientKeys: TypeAlias = npt.NDArray[np.uint64]
"""Each identifies the client of a connection: the series number is above the hash of the
client. Those without connection, whose number is 0, come first in ascending order."""

_SHIFT = np.uint64(CLIENT_BITS)
_FIRST = np.uint64(1 << CLIENT_BITS)
_HASH = np.uint64((1 << CLIENT_BITS) - 1)

MERGED_SHARE = 0.25
"""If more than this share of the clients has changed, sorting all again is faster."""


class Chunk(NamedTuple):
    """Slots of a source."""

    words: Words
    clients: Clients | None = None
    """The hash of the client of each slot; None: clients are not counted."""

    def only(self, chosen: slice | npt.NDArray[np.intp]) -> "Chunk":
        """Return the chosen slots; with a slice, in the same memory."""
        clients = None if self.clients is None else self.clients[chosen]
        return Chunk(self.words[chosen], clients)

    def padded(self, size: int) -> "Chunk":
        """Return at least ``size`` slots: empty ones are added at the end."""
        missing = np.zeros(max(0, size - len(self.words)), np.uint64)
        if not len(missing):
            return self
        clients = None if self.clients is None else np.append(self.clients, missing)
        return Chunk(np.append(self.words, missing), clients)

    def put(self, chosen: npt.NDArray[np.intp], slots: "Chunk") -> None:
        """Replace the chosen slots."""
        self.words[chosen] = slots.words
        if self.clients is not None and slots.clients is not None:
            self.clients[chosen] = slots.clients

    def keys(self) -> ClientKeys:
        """Return the keys of the clients.

        If clients are not counted, all connections of a series have the same key.
        """
        keys = self.words & np.uint64(SERIES_MASK)
        keys <<= _SHIFT
        if self.clients is not None:
            keys |= self.clients
        return keys


class ClientCounts(NamedTuple):
    """Distinct clients; all arrays have one element for each series."""

    established: npt.NDArray[np.int64]
    """Clients with a connection."""
    long_term: npt.NDArray[np.int64]
    """Clients with a long-term connection."""
    largest: npt.NDArray[np.int64]
    """Connections of the client that has most."""


def _numbers_of(keys: ClientKeys) -> npt.NDArray[np.int64]:
    """Return the series numbers of clients."""
    return (keys >> _SHIFT).view(np.int64)


class _Totals(NamedTuple):
    """The clients of all connections, of any age; one element for each series number."""

    established: npt.NDArray[np.int64]
    largest: npt.NDArray[np.int64]
    """As in `ClientCounts`."""


class ClientTable:
    """The distinct clients of all series numbers, and the connections of each client.

    Between scrapes, few connections change. So the table stays sorted from scrape to
    scrape, and only what has changed is merged into it.
    """

    def __init__(self) -> None:
        self._keys: ClientKeys = np.empty(0, np.uint64)
        """In ascending order."""
        self._connections: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._closed: list[ClientKeys] = []
        self._opened: list[ClientKeys] = []
        self._changes = 0
        self._totals: _Totals | None = None
        """Those of the table; None: it has changed since they were calculated."""

    def change(self, keys: ClientKeys, step: int) -> None:
        """Record that clients have opened connections, or closed them if ``step`` is -1.

        `merge` puts them into the table.
        """
        self._changes += len(keys)
        if not self._has_many_changes():
            (self._opened if step > 0 else self._closed).append(keys)

    def merge(self, slots: Iterable[ClientKeys]) -> None:
        """Put what has changed into the table.

        Args:
            slots: the clients of all slots, in case that too many have changed.
        """
        if not self._changes:
            return
        if self._has_many_changes():
            open_now = np.concatenate(
                [np.empty(0, np.uint64), *(each[each >= _FIRST] for each in slots)]
            )
            self._keys, self._connections = _distinct(open_now)
        else:
            self._merge_changes()
        self._totals = None
        self._closed, self._opened, self._changes = [], [], 0

    def _has_many_changes(self) -> bool:
        # A slot that changes closes one connection and opens another: two changes.
        return self._changes > 2 * MERGED_SHARE * len(self._keys)

    def _merge_changes(self) -> None:
        changed = np.concatenate((*self._closed, *self._opened))
        order = np.argsort(changed)
        changed = changed[order]
        first = _first_of_each(changed)
        closed = sum(map(len, self._closed))
        difference = np.where(order < closed, np.int32(-1), np.int32(1))
        difference = np.add.reduceat(difference, first)
        is_changed = (difference != 0) & (changed[first] >= _FIRST)
        changed, difference = changed[first][is_changed], difference[is_changed]

        at, is_known = find(self._keys, changed)
        known = at[is_known]
        self._connections[known] += difference[is_known]
        gone = known[self._connections[known] == 0]
        self._keys = np.delete(self._keys, gone)
        self._connections = np.delete(self._connections, gone)

        new, connections = changed[~is_known], difference[~is_known]
        at = np.searchsorted(self._keys, new)
        self._keys = np.insert(self._keys, at, new)
        self._connections = np.insert(self._connections, at, connections)

    def counts(self, numbers: int, young: ClientKeys) -> ClientCounts:
        """Return the clients of the first ``numbers`` series numbers.

        Args:
            numbers: how many there are.
            young: the client of each connection that is not long-term.
        """
        if self._totals is None or len(self._totals.established) != numbers:
            self._totals = self._added_up(numbers)
        established = long_term = self._totals.established
        if len(young):
            young, connections = _distinct(young[young >= _FIRST])
            at = np.searchsorted(self._keys, young)
            has_only_young = self._connections[at] == connections
            only_young = _numbers_of(young[has_only_young])
            long_term = established - np.bincount(only_young, minlength=numbers)[:numbers]
        return ClientCounts(established, long_term, self._totals.largest)

    def _added_up(self, numbers: int) -> _Totals:
        begin = self._begin(numbers)
        clients = np.diff(begin)
        largest = np.zeros(numbers, np.int64)
        used = np.flatnonzero(clients)
        if len(used):
            connections = self._connections[: begin[-1]]
            largest[used] = np.maximum.reduceat(connections, begin[used])
        return _Totals(clients, largest)

    def joined(self, new_numbers: npt.NDArray[np.int64]) -> "ClientTable":
        """Return a table in which number n has become ``new_numbers[n]``.

        The clients of numbers that become one number are merged.

        Args:
            new_numbers: of each series number, at least 1; 0: leave it out.
        """
        chosen = np.flatnonzero(new_numbers[_numbers_of(self._keys)])
        moved = _moved(self._keys[chosen], new_numbers)
        table = ClientTable()
        table._keys, table._connections = _distinct(
            np.repeat(moved, self._connections[chosen])
        )
        return table

    def _begin(self, numbers: int) -> npt.NDArray[np.intp]:
        """Return where the clients of each number begin; the last element is the end."""
        first = np.arange(numbers + 1, dtype=np.uint64) << _SHIFT
        return np.searchsorted(self._keys, first)


class SeenClients:
    """The clients of all connections, as one scrape has read them."""

    def __init__(self, table: ClientTable, young: Sequence[ClientKeys]) -> None:
        """Use a table until the next scrape, and the clients of young connections.

        Args:
            table: of all connections.
            young: the client of each connection that is not long-term, in pieces.
        """
        self._table = table
        self._young = np.concatenate((np.empty(0, np.uint64), *young))

    def counts(self, rows: npt.NDArray[np.int64], size: int) -> ClientCounts:
        """Return the distinct clients of each series.

        Args:
            rows: the index of the series that each number is counted in; -1: none.
            size: how many series there are.
        """
        found = self._table.counts(len(rows), self._young)
        used = np.flatnonzero((rows >= 0) & (found.established > 0))
        is_shared = np.bincount(rows[used], minlength=size)[rows[used]] > 1
        own, shared = used[~is_shared], used[is_shared]
        counts = ClientCounts(*np.zeros((3, size), np.int64))
        for into, each in zip(counts, found, strict=True):
            into[rows[own]] = each[own]
        if len(shared):
            self._count_shared(shared, rows, counts)
        return counts

    def _count_shared(
        self,
        numbers: npt.NDArray[np.intp],
        rows: npt.NDArray[np.int64],
        counts: ClientCounts,
    ) -> None:
        """Count the clients of numbers that share a row; equal ones count as one client."""
        new_numbers = np.zeros(len(rows), np.int64)
        new_numbers[numbers] = rows[numbers] + 1
        young = self._young[new_numbers[_numbers_of(self._young)] > 0]
        joined = self._table.joined(new_numbers)
        found = joined.counts(len(counts[0]) + 1, _moved(young, new_numbers))
        filled = distinct(rows[numbers])
        for into, each in zip(counts, found, strict=True):
            into[filled] = each[filled + 1]


def _moved(keys: ClientKeys, new_numbers: npt.NDArray[np.int64]) -> ClientKeys:
    """Return the same clients, with each series number n replaced by new_numbers[n]."""
    moved = new_numbers[_numbers_of(keys)].astype(np.uint64) << _SHIFT
    moved |= keys & _HASH
    return moved


def _distinct(keys: ClientKeys) -> tuple[ClientKeys, npt.NDArray[np.int32]]:
    """Sort clients in place; return each one once, and how often it occurs."""
    keys.sort()
    first = _first_of_each(keys)
    return keys[first], np.diff(first, append=len(keys)).astype(np.int32)


def _first_of_each(keys: ClientKeys) -> npt.NDArray[np.intp]:
    """Return where each value of a sorted array begins."""
    is_first = np.empty(len(keys), np.bool_)
    is_first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)
