# SPDX-License-Identifier: GPL-3.0-only
"""Counts the distinct clients of each series."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import CLIENT_BITS, Clients
from tcpexporter.connections.record import SERIES_MASK, Words

Seen: TypeAlias = npt.NDArray[np.uint64]
"""A number for each slot: from the highest bit to the lowest, its series number, the
hash of its client, and whether it is too young to be long-term."""

_NUMBER_SHIFT = np.uint64(CLIENT_BITS + 1)
_BELOW_NUMBER = np.uint64((1 << CLIENT_BITS + 1) - 1)


class Chunk(NamedTuple):
    """Slots of a source."""

    words: Words
    clients: Clients | None = None
    """The hash of the client of each slot; None: clients are not counted."""


@dataclass(frozen=True)
class ClientCounts:
    """Distinct clients; all arrays have one element for each series."""

    established: npt.NDArray[np.int64]
    """Clients with a connection."""
    long_term: npt.NDArray[np.int64]
    """Clients with a long-term connection."""
    largest: npt.NDArray[np.int64]
    """Connections of the client that has most."""


def seen(words: Words, clients: Clients, limit: np.uint64) -> Seen:
    """Return the clients of connections; a slot without connection has the number 0.

    Args:
        words: of slots.
        clients: of the same slots.
        limit: words from this one on are those of connections that are not long-term.
    """
    found = words & np.uint64(SERIES_MASK)
    found <<= np.uint64(CLIENT_BITS)
    found |= clients
    found <<= np.uint64(1)
    found |= words >= limit
    return found


def count_clients(
    found: Iterable[Seen], rows: npt.NDArray[np.int64], size: int
) -> ClientCounts:
    """Count the distinct clients of each series.

    Args:
        found: the clients of all connections, in pieces.
        rows: the index of the series that each number is counted in; -1: none.
        size: how many series there are.
    """
    keys = np.concatenate([np.empty(0, np.uint64), *(_keys(each, rows) for each in found)])
    keys.sort()
    # Where each client begins; those of a series are consecutive.
    is_first = np.empty(len(keys), np.bool_)
    is_first[:1] = True
    # Of one client, only the lowest bit can differ.
    np.greater(keys[1:] ^ keys[:-1], np.uint64(1), out=is_first[1:])
    first = np.flatnonzero(is_first)
    begin = np.searchsorted(keys, np.arange(size, dtype=np.uint64) << _NUMBER_SHIFT)
    begin = np.searchsorted(first, begin)
    established = np.diff(begin, append=len(first))
    long_term, largest = np.zeros((2, size), np.int64)
    if len(used := np.flatnonzero(established)):
        # Of one client, long-term connections come first.
        is_long_term = keys[first] & np.uint64(1) == 0
        long_term[used] = np.add.reduceat(is_long_term, begin[used], dtype=np.int64)
        connections = np.diff(first, append=len(keys))
        largest[used] = np.maximum.reduceat(connections, begin[used])
    return ClientCounts(established, long_term, largest)


def _keys(found: Seen, rows: npt.NDArray[np.int64]) -> Seen:
    """Return the clients that are counted, with the index of a series for its number."""
    row = rows.take((found >> _NUMBER_SHIFT).view(np.int64))
    is_counted = row >= 0
    if not is_counted.all():
        row, found = row[is_counted], found[is_counted]
    keys = row.view(np.uint64) << _NUMBER_SHIFT
    keys |= found & _BELOW_NUMBER
    return keys
