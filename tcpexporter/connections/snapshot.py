# SPDX-License-Identifier: GPL-3.0-only
"""Copies connections that the kernel may be writing to, and joins them with earlier ones.

A connection exists in a slot if ``series_and_time`` is not 0. The BPF program writes it
last when a connection opens, and nothing else when it closes. No two connections in a slot
have the same value: one would have to close, and the next to open, within 8,192 ns. So if
the value is the same before and after other fields were read, these belong to the same
connection.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import hashes
from tcpexporter.connections.record import KEY, SOCKET, Records, times_ns

OLD_OUTBOUND_BIT = 17
"""The bit of ``group`` that is set for outbound connections, in records of version 1."""


def consistent_fields(
    window: Records, *names: str
) -> tuple[npt.NDArray[np.intp], dict[str, npt.NDArray[Any]]]:
    """Copy fields of the connections that do not change while they are copied.

    Args:
        window: slots that the kernel may write to at any time.
        names: the fields to copy besides ``series_and_time``.

    Returns:
        The indices in ``window`` of these connections; and the copied fields by name, each
        an array with one element per index.
    """
    return _consistent(window, ("series_and_time",), names)


def _consistent(
    window: Records, marks: tuple[str, ...], names: tuple[str, ...]
) -> tuple[npt.NDArray[np.intp], dict[str, npt.NDArray[Any]]]:
    """Do that for slots in which the fields ``marks`` together identify a connection.

    The first of them is 0 if there is none.
    """
    before = {mark: window[mark].copy() for mark in marks}
    index = np.flatnonzero(before[marks[0]])
    fields = {name: window[name][index] for name in names}
    fields |= {mark: before[mark][index] for mark in marks}
    is_same = np.ones(len(index), np.bool_)
    for mark in marks:
        is_same &= window[mark][index] == fields[mark]
    if not is_same.all():
        index = index[is_same]
        fields = {name: field[is_same] for name, field in fields.items()}
    return index, fields


def valid_connections(window: Records) -> Records:
    """Copy the connections that do not change and that a socket can have.

    A connection without a local port is left out, and ``established_ns`` is at most the
    present time. So wrong records of another version of the exporter do no harm.

    Args:
        window: as in `consistent_fields`. Its dtype has the field ``key``, and
            ``series_and_time`` and ``is_outbound``, or, in version 1 of the layout,
            ``group`` and ``established_ns``, at any offsets.

    Returns:
        The connections, of dtype `SOCKET`, with ``cookie`` 0.
    """
    if "group" in (window.dtype.names or ()):
        index, fields = _consistent(window, ("group", "established_ns"), ("key",))
        established_ns = fields["established_ns"]
        is_outbound = fields["group"] >> np.uint32(OLD_OUTBOUND_BIT) & np.uint32(1)
    else:
        index, fields = consistent_fields(window, "key", "is_outbound")
        established_ns = times_ns(fields["series_and_time"])
        is_outbound = (fields["is_outbound"] != 0).astype(np.uint32)
    connections = np.zeros(len(index), SOCKET)
    for name in KEY.names or ():
        connections["key"][name] = fields["key"][name]
    connections["is_outbound"] = is_outbound
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
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        same = np.flatnonzero(wanted[at] == found)
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
