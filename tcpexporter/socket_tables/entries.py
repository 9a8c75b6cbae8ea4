# SPDX-License-Identifier: GPL-3.0-only
"""Turns the entries of a socket table into connections and listeners."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.record import (
    IPV4_PREFIX,
    KEY,
    LISTENER,
    PORTS,
    SOCKET,
    Direction,
    Records,
    ip_versions,
)

Bytes = npt.NDArray[np.uint8]

TCP_ESTABLISHED = 1
TCP_LISTEN = 10
"""Socket states: include/net/tcp_states.h."""

ENTRY = np.dtype(
    [("key", KEY), ("state", "u1"), ("v6only", "?"), ("age_ns", "i8"), ("cookie", "u8")]
)
"""A socket, as sock_diag or procfs describes it.

``state`` is a TCP state. ``v6only`` is whether a listener refuses IPv4 clients. ``age_ns``
is a lower bound of the time for which a connection has been established. ``cookie`` is the
number that no other socket gets until the host boots again. A field is 0 where the table
does not have it.
"""


def connections(chunks: Iterable[Records]) -> tuple[Records, bool]:
    """Makes connections from all entries of one network namespace.

    A connection is inbound if the namespace has a listener at its local port.

    Args:
        chunks: the entries, of dtype `ENTRY`. Their ages are subtracted from the time at
            which the iterator yields a chunk.

    Returns:
        The established connections, of dtype `SOCKET`, and whether there is any listener.
    """
    found = []
    has_listener = np.zeros(PORTS, np.bool_)
    for entries in chunks:
        is_listener = entries["state"] == TCP_LISTEN
        has_listener[entries["key"]["local_port"][is_listener]] = True
        found.append(_established(entries[entries["state"] == TCP_ESTABLISHED]))
    joined = concatenate(found, SOCKET)
    is_inbound = has_listener[joined["key"]["local_port"]]
    joined["is_outbound"] = np.where(is_inbound, Direction.INBOUND, Direction.OUTBOUND)
    return joined, bool(has_listener.any())


def _established(entries: Records) -> Records:
    """Entries as dtype `SOCKET`, with ``is_outbound`` still 0."""
    found = np.zeros(len(entries), SOCKET)
    found["key"] = entries["key"]
    found["cookie"] = entries["cookie"]
    found["established_ns"] = np.maximum(boottime_ns() - entries["age_ns"], 0)
    return found


def listeners(entries: Records) -> Records:
    """Makes listeners, of dtype `LISTENER`, from entries of sockets in state LISTEN.

    A socket that listens at :: accepts IPv4 clients too, unless it is ``v6only``. It
    becomes two listeners.
    """
    versions = ip_versions(entries["key"])
    is_any = (entries["key"]["local_address"] == 0).all(axis=1)
    accepts_both = is_any & ~entries["v6only"]
    made = np.zeros(len(entries) + int(accepts_both.sum()), LISTENER)
    made["netns"] = np.concatenate(
        [entries["key"]["netns"], entries["key"]["netns"][accepts_both]]
    )
    ports = entries["key"]["local_port"]
    made["port"] = np.concatenate([ports, ports[accepts_both]])
    made["ip_version"] = 4
    made["ip_version"][: len(entries)] = versions
    return made


def v4_mapped(addresses: Bytes) -> Bytes:
    """IPv4 addresses, of shape (n, 4), as ::ffff:a.b.c.d, of shape (n, 16)."""
    prefix = np.broadcast_to(IPV4_PREFIX, (len(addresses), len(IPV4_PREFIX)))
    return np.hstack([prefix, addresses])


def concatenate(chunks: list[Records], dtype: np.dtype[np.void]) -> Records:
    """All records of ``chunks``; an empty array of ``dtype`` if there is no chunk."""
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)
