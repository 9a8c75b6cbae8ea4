# SPDX-License-Identifier: GPL-3.0-only
"""Array dtypes for connections and listeners, and the values of their fields."""

import enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class Direction(enum.IntEnum):
    """The end that opened a connection. The values are those of the bit in ``group``."""

    INBOUND = 0
    OUTBOUND = 1


KEY = np.dtype(
    [
        ("local_address", "u1", 16),
        ("remote_address", "u1", 16),
        ("netns", "u4"),
        ("local_port", "u2"),
        ("remote_port", "u2"),
    ]
)
"""``struct connection_key``: the fields that identify a connection.

Addresses are bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in host order.
``netns`` is the inode of the network namespace.
"""

CONNECTION = np.dtype(
    [
        ("established_ns", "u8"),
        ("handle", "u8"),
        ("key", KEY),
        ("group", "u4"),
        ("pad", "u4"),
    ]
)
"""``struct connection``: a slot of the tracker, which the BPF program writes to.

``established_ns`` is on CLOCK_BOOTTIME. The BPF program finds the slot by its ``handle``:
the address of the socket, or the hash of the key of a seed (bpf/tcp_tracker.c). ``group``
is the result of `groups`; 0 means that the slot has no connection.
"""

SOCKET = np.dtype(
    [
        ("established_ns", "u8"),
        ("cookie", "u8"),
        ("key", KEY),
        ("group", "u4"),
        ("pad", "u4"),
    ]
)
"""A connection as the socket tables report it.

``established_ns``, ``key`` and ``group`` are as in `CONNECTION`. ``cookie`` is the socket's
number, or 0 if it is unknown. The kernel gives a number to one socket only until the host
boots again (sock_gen_cookie in the kernel's net/core/sock_diag.c).
"""

GROUP_IPV6 = 1 << 16
DIRECTION_BIT = 17
GROUP_BITS = 18
"""Bits of ``group``: 16 for the local port, 1 for the IP version, 1 for the direction."""

LISTENER = np.dtype([("netns", "u4"), ("port", "u2"), ("ip_version", "u1")])
"""A listening port and an IP version, 4 or 6, that its socket accepts."""

Records: TypeAlias = npt.NDArray[np.void]
"""A one-dimensional array of one of the dtypes above."""

Groups: TypeAlias = npt.NDArray[np.uint32]

PORTS = 65536
"""Number of possible ports, including 0."""

IPV4_PREFIX = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
"""The first 12 bytes of ::ffff:a.b.c.d."""


def ip_versions(keys: Records) -> npt.NDArray[np.uint8]:
    """Return the IP version on the wire, 4 or 6, of each key.

    An IPv4 client of a dual-stack socket has v4-mapped addresses: the result is 4.

    Args:
        keys: of dtype `KEY`.
    """
    # Words instead of bytes: three comparisons per key instead of twelve.
    prefix = keys["local_address"].view(np.uint32)[:, :3]
    is_mapped = (prefix == IPV4_PREFIX.view(np.uint32)).all(axis=1)
    return np.where(is_mapped, np.uint8(4), np.uint8(6))


def groups(keys: Records, directions: npt.NDArray[np.integer] | Direction) -> Groups:
    """Return the local port, IP version and direction of connections, as ``group``.

    Args:
        keys: of dtype `KEY`. No local port is 0, so no ``group`` is 0.
        directions: a `Direction` for each key, or one for all.
    """
    group = keys["local_port"].astype(np.uint32)
    group |= np.where(ip_versions(keys) == 6, np.uint32(GROUP_IPV6), np.uint32(0))
    group |= np.asarray(directions, np.uint32) << np.uint32(DIRECTION_BIT)
    return group


def directions(group: Groups) -> npt.NDArray[np.uint32]:
    """Return the `Direction` of each ``group``."""
    return group >> np.uint32(DIRECTION_BIT) & np.uint32(1)
