# SPDX-License-Identifier: GPL-3.0-only
"""Copies connections that the kernel may be writing to, and joins them with earlier ones.

A slot has a connection if its word has a series number. The BPF program writes the word
last when a connection opens, and only the word when it closes. No two connections in a slot
have the same word: one would have to close, and the next to open, within 8,192 ns. So if
the word is the same before and after other fields were read, these belong to the same
connection. `memory_order` argues that for machines that reorder loads and stores.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import hashes
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.record import (
    KEY,
    SERIES_MASK,
    SOCKET,
    Records,
    Words,
    times_ns,
)
from tcpexporter.connections.sets import find

OLD_OUTBOUND_BIT = 17
"""The bit of ``group`` that is set for outbound connections, in records of version 1."""


def consistent_fields(
    window: Records, words: Words, *names: str
) -> tuple[npt.NDArray[np.intp], Words, dict[str, npt.NDArray[Any]]]:
    """Copy fields of the connections that do not change while they are copied.

    Args:
        window: slots that the kernel may write to at any time.
        words: of the same slots.
        names: the fields to copy.

    Returns:
        The index in ``window`` of each such connection, its word, and the copies of the
        fields, by name, with one element for each index.
    """
    before = words.copy()
    memory_barrier()
    index = np.flatnonzero(before & np.uint64(SERIES_MASK))
    fields = {name: window[name][index] for name in names}
    memory_barrier()
    is_same = words[index] == before[index]
    index = index[is_same]
    return index, before[index], {name: field[is_same] for name, field in fields.items()}


def valid_old_connections(window: Records) -> Records:
    """Do the same as `valid_connections`, for a window of version 1 of the layout.

    Args:
        window: with the fields ``key``, ``established_ns`` and ``group``. A slot has a
            connection if ``group`` is not 0.
    """
    before = window[["group", "established_ns"]].copy()
    index = np.flatnonzero(before["group"])
    keys = window["key"][index]
    is_same = window[["group", "established_ns"]][index] == before[index]
    index = index[is_same]
    is_outbound = before["group"][index] >> np.uint32(OLD_OUTBOUND_BIT) & np.uint32(1)
    return _valid(keys[is_same], is_outbound, before["established_ns"][index], np.uint64(0))


def valid_connections(window: Records, words: Words) -> Records:
    """Copy the connections that do not change meanwhile, and correct invalid values.

    A connection without a local port is left out, and ``established_ns`` is at most the
    present time. So wrong records of another version of the exporter do no harm.

    Args:
        window: as in `consistent_fields`. Its dtype has the fields ``key`` and
            ``is_outbound``, at any offsets, and ``cgroup`` if it was recorded.
        words: as in `consistent_fields`.

    Returns:
        The connections, of dtype `SOCKET`, with ``cookie`` 0.
    """
    _, found, fields = consistent_fields(window, words, *(window.dtype.names or ()))
    return _valid(
        fields["key"],
        fields["is_outbound"] != 0,
        times_ns(found),
        fields.get("cgroup", np.uint64(0)),
    )


def _valid(
    keys: Records,
    is_outbound: npt.NDArray[Any],
    established_ns: npt.NDArray[np.uint64],
    cgroups: npt.NDArray[np.uint64] | np.uint64,
) -> Records:
    connections = np.zeros(len(keys), SOCKET)
    for name in KEY.names or ():
        connections["key"][name] = keys[name]
    connections["is_outbound"] = is_outbound
    connections["cgroup"] = cgroups
    connections["established_ns"] = np.minimum(established_ns, boottime_ns())
    valid: Records = connections[connections["key"]["local_port"] != 0]
    return valid


def first_seen(now: Records, before: Iterable[Records]) -> Records:
    """Give connections the time and direction that they had in earlier records.

    The direction is kept too: a service that stops listening keeps its connections, and
    they stay inbound.

    Args:
        now: the connections, of dtype `SOCKET`; changed in place.
        before: earlier records, of dtype `SOCKET`, in chunks. If several records have the
            same key, the one with the latest ``established_ns`` is used.

    Returns:
        ``now``.
    """
    if not len(now):
        return now
    wanted, place = np.unique(hashes(now["key"]), return_inverse=True)
    established_ns = np.zeros(len(wanted), np.uint64)
    is_outbound = np.zeros(len(wanted), np.uint32)
    is_known = np.zeros(len(wanted), np.bool_)
    for chunk in before:
        found = hashes(chunk["key"])
        at, is_wanted = find(wanted, found)
        same = np.flatnonzero(is_wanted)
        same = same[np.argsort(chunk["established_ns"][same])]
        same = same[chunk["established_ns"][same] >= established_ns[at[same]]]
        # An assignment with repeated indices keeps the last value, here the latest time.
        established_ns[at[same]] = chunk["established_ns"][same]
        is_outbound[at[same]] = chunk["is_outbound"][same]
        is_known[at[same]] = True
    known = np.flatnonzero(is_known[place])
    now["established_ns"][known] = established_ns[place[known]]
    now["is_outbound"][known] = is_outbound[place[known]]
    return now


def with_cgroups(connections: Records, shown: Records) -> Records:
    """Give connections without a known cgroup that of the socket with the same key.

    Args:
        connections: of dtype `SOCKET`; changed in place.
        shown: of the same dtype, with cgroups.

    Returns:
        ``connections``.
    """
    lacking = np.flatnonzero(connections["cgroup"] == 0)
    if len(lacking) and len(shown):
        known, first = np.unique(hashes(shown["key"]), return_index=True)
        wanted = hashes(connections["key"][lacking])
        at, same = find(known, wanted)
        connections["cgroup"][lacking[same]] = shown["cgroup"][first[at[same]]]
    return connections
