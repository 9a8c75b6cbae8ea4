# SPDX-License-Identifier: GPL-3.0-only
"""Copies connections that the kernel may be writing to, and joins them with earlier ones.

A slot has a connection if its ``group`` is not 0. The BPF program writes ``group`` last
when a connection opens, and writes only ``group`` when it closes. No two connections of a
slot have the same ``established_ns``. So read both fields, then the other fields, then both
fields again. If both are unchanged, the other fields belong to the same connection.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import hashes
from tcpexporter.connections.record import KEY, SOCKET, Records, directions, groups


def consistent_fields(
    window: Records, *names: str
) -> tuple[npt.NDArray[np.intp], dict[str, npt.NDArray[Any]]]:
    """Copy fields of the connections that do not change while they are copied.

    Args:
        window: slots that the kernel may write to at any time.
        names: the fields to copy besides ``group`` and ``established_ns``.

    Returns:
        The indices in ``window`` of these connections; and the copied fields by name, each
        an array with one element per index.
    """
    group = window["group"].copy()
    established_ns = window["established_ns"].copy()
    index = np.flatnonzero(group)
    fields = {name: window[name][index] for name in names}
    fields |= {"group": group[index], "established_ns": established_ns[index]}
    is_same = window["group"][index] == fields["group"]
    is_same &= window["established_ns"][index] == fields["established_ns"]
    if not is_same.all():
        index = index[is_same]
        fields = {name: field[is_same] for name, field in fields.items()}
    return index, fields


def valid_connections(window: Records) -> Records:
    """Copy the connections that do not change while they are copied, and correct them.

    The records may come from another version of the exporter, so they are checked. A
    connection without a local port is left out. The IP version and the port in ``group``
    are computed again from the key. An ``established_ns`` in the future becomes the
    present time.

    Args:
        window: slots that the kernel may write to at any time. The dtype has at least the
            fields ``key``, ``group`` and ``established_ns``, in any layout.

    Returns:
        The connections, of dtype `SOCKET`, with ``cookie`` 0.
    """
    index, fields = consistent_fields(window, "key")
    connections = np.zeros(len(index), SOCKET)
    for name in KEY.names or ():
        connections["key"][name] = fields["key"][name]
    connections["group"] = groups(connections["key"], directions(fields["group"]))
    connections["established_ns"] = np.minimum(fields["established_ns"], boottime_ns())
    valid: Records = connections[connections["key"]["local_port"] != 0]
    return valid


def first_seen(now: Records, before: Iterable[Records]) -> Records:
    """Set the time and direction of connections to those in earlier records.

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
    group = np.zeros(len(wanted), np.uint32)
    for chunk in before:
        found = hashes(chunk["key"])
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        same = np.flatnonzero(wanted[at] == found)
        same = same[np.argsort(chunk["established_ns"][same])]
        same = same[chunk["established_ns"][same] >= established_ns[at[same]]]
        # An assignment with repeated indices keeps the last value, here the latest time.
        established_ns[at[same]] = chunk["established_ns"][same]
        group[at[same]] = chunk["group"][same]
    known = np.flatnonzero(group[place])
    now["established_ns"][known] = established_ns[place[known]]
    now["group"][known] = group[place[known]]
    return now
