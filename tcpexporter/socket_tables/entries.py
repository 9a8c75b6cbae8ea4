# SPDX-License-Identifier: GPL-3.0-only
"""Converts the entries of a socket table to connections and listeners."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.parts import PORTS, Direction
from tcpexporter.connections.record import (
    IPV4_PREFIX,
    KEY,
    LISTENER,
    SOCKET,
    Records,
    ip_versions,
)

Bytes = npt.NDArray[np.uint8]

TCP_ESTABLISHED = 1
TCP_LISTEN = 10
"""Socket states: include/net/tcp_states.h."""

BATCH = 1 << 17
"""Number of connections that are converted at once, in 11 MiB."""

ENTRY = np.dtype(
    [
        ("key", KEY),
        ("state", "u1"),
        ("v6only", "?"),
        ("age_ns", "i8"),
        ("cookie", "u8"),
        ("cgroup", "u8"),
    ]
)
"""A socket, as sock_diag or procfs describes it.

``state`` is a TCP state. ``v6only`` is 1 if a listener refuses IPv4 clients. ``age_ns`` is
a lower bound of the age of a connection. ``cookie`` and ``cgroup`` are as in `SOCKET`. A
field is 0 if the table does not have it.
"""


def connections(chunks: Iterable[Records]) -> tuple[Records, bool]:
    """Convert all entries of one network namespace to connections.

    A connection is inbound if the namespace has a listener at its local port.

    Args:
        chunks: the entries, of dtype `ENTRY`. The age of an entry is subtracted from the
            time when the iterator yields its chunk.

    Returns:
        The established connections, of dtype `SOCKET`, and whether there is any listener.
    """
    found = []
    has_listener = np.zeros(PORTS, np.bool_)
    for entries in chunks:
        is_listener = entries["state"] == TCP_LISTEN
        has_listener[entries["key"]["local_port"][is_listener]] = True
        found.append(_established(entries[entries["state"] == TCP_ESTABLISHED]))
    return _directed(found, has_listener), bool(has_listener.any())


def batches(
    chunks: Iterable[Records], has_listener: npt.NDArray[np.bool_]
) -> Iterator[Records]:
    """Convert entries of one network namespace to connections, many at a time.

    Args:
        chunks: as for `connections`.
        has_listener: of `listening_ports`.

    Yields:
        The established connections, of dtype `SOCKET`, in batches of about `BATCH` ones.
    """
    found: list[Records] = []
    for entries in chunks:
        found.append(_established(entries[entries["state"] == TCP_ESTABLISHED]))
        if sum(map(len, found)) >= BATCH:
            yield _directed(found, has_listener)
            found = []
    if any(map(len, found)):
        yield _directed(found, has_listener)


def listening_ports(chunks: Iterable[Records]) -> npt.NDArray[np.bool_]:
    """Return for each of the 65536 ports whether an entry in state LISTEN has it."""
    has_listener = np.zeros(PORTS, np.bool_)
    for entries in chunks:
        is_listener = entries["state"] == TCP_LISTEN
        has_listener[entries["key"]["local_port"][is_listener]] = True
    return has_listener


def _directed(found: list[Records], has_listener: npt.NDArray[np.bool_]) -> Records:
    joined = concatenate(found, SOCKET)
    is_inbound = has_listener[joined["key"]["local_port"]]
    joined["is_outbound"] = np.where(is_inbound, Direction.INBOUND, Direction.OUTBOUND)
    return joined


def _established(entries: Records) -> Records:
    """Return entries as dtype `SOCKET`, with ``is_outbound`` 0."""
    found = np.zeros(len(entries), SOCKET)
    found["key"] = entries["key"]
    found["cookie"] = entries["cookie"]
    found["cgroup"] = entries["cgroup"]
    found["established_ns"] = np.maximum(boottime_ns() - entries["age_ns"], 0)
    return found


def listeners(entries: Records) -> Records:
    """Convert entries of sockets in state LISTEN to dtype `LISTENER`.

    A socket that listens at :: and is not ``v6only`` accepts IPv4 clients too. It becomes
    two listeners.
    """
    versions = ip_versions(entries["key"])
    is_any = (entries["key"]["local_address"] == 0).all(axis=1)
    accepts_both = is_any & ~entries["v6only"]
    made = np.zeros(len(entries) + int(accepts_both.sum()), LISTENER)
    for name, values in (
        ("netns", entries["key"]["netns"]),
        ("port", entries["key"]["local_port"]),
        ("cgroup", entries["cgroup"]),
    ):
        made[name] = np.concatenate([values, values[accepts_both]])
    made["ip_version"] = 4
    made["ip_version"][: len(entries)] = versions
    return made


def distinct_listeners(listeners: Records) -> Records:
    """Return each listener once, in ascending order.

    A server may have many sockets for one port, such as one for each CPU. np.unique
    compares whole records: it requires about 1 ms for a thousand listeners.
    """
    names = LISTENER.names or ()
    ordered = listeners[np.lexsort([listeners[name] for name in reversed(names)])]
    is_first = np.ones(len(ordered), np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


def v4_mapped(addresses: Bytes) -> Bytes:
    """Convert IPv4 addresses, of shape (n, 4), to ::ffff:a.b.c.d, of shape (n, 16)."""
    prefix = np.broadcast_to(IPV4_PREFIX, (len(addresses), len(IPV4_PREFIX)))
    return np.hstack([prefix, addresses])


def concatenate(chunks: list[Records], dtype: np.dtype[np.void]) -> Records:
    """Return all records of ``chunks``; without chunks, an empty array of ``dtype``.

    A single chunk is returned itself.
    """
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)
