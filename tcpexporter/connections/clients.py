# SPDX-License-Identifier: GPL-3.0-only
"""Counts the distinct clients of each series."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import CLIENT_BITS, Clients
from tcpexporter.connections.record import SERIES_MASK, Words

Seen: TypeAlias = npt.NDArray[np.uint64]
"""A number for each slot: from the highest bit to the lowest, its series number, the
hash of its client, and whether it is too young to be long-term."""

PIECE = 8192
"""Number of slots that are handled at once: all arrays fit into the cache of a CPU."""

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


def count_clients(found: Seen, rows: npt.NDArray[np.int64], size: int) -> ClientCounts:
    """Count the distinct clients of each series.

    Args:
        found: the clients of all connections.
        rows: the index of the series that each number is counted in; -1: none.
        size: how many series there are.
    """
    pieces = range(0, len(found), PIECE)
    keys = np.concatenate(
        [np.empty(0, np.uint64), *(_keys(found[at : at + PIECE], rows) for at in pieces)]
    )
    keys.sort()
    clients = keys >> np.uint64(1)
    first = np.flatnonzero(np.append(True, clients[1:] != clients[:-1])[: len(keys)])
    keys = keys[first]
    # The clients of a series are those from its begin to its end.
    begin = np.searchsorted(keys, np.arange(size, dtype=np.uint64) << _NUMBER_SHIFT)
    established = np.diff(begin, append=len(keys))
    long_term, largest = np.zeros((2, size), np.int64)
    if len(used := np.flatnonzero(established)):
        # Of one client, long-term connections come first.
        is_long_term = ~keys & np.uint64(1)
        long_term[used] = np.add.reduceat(is_long_term, begin[used])
        connections = np.diff(first, append=len(clients))
        largest[used] = np.maximum.reduceat(connections, begin[used])
    return ClientCounts(established, long_term, largest)


def _keys(found: Seen, rows: npt.NDArray[np.int64]) -> Seen:
    """Return the clients that are counted, with the index of a series for its number."""
    row = rows.take((found >> _NUMBER_SHIFT).view(np.int64))
    is_counted = np.flatnonzero(row >= 0)
    keys = found.take(is_counted) & _BELOW_NUMBER
    keys |= row.take(is_counted).view(np.uint64) << _NUMBER_SHIFT
    return keys
