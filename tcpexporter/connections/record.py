# SPDX-License-Identifier: GPL-3.0-only
"""The connection record, as the BPF program writes it and as numpy reads it."""

import enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class Direction(enum.IntEnum):
    """Which end opened a connection; as `groups` has it."""

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
"""``struct connection_key``: what a connection is known by.

Addresses are bytes in network order, IPv4 as ::ffff:a.b.c.d; ``netns`` is
the inode of the network namespace.
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
"""``struct connection``: a connection and where it is counted.

``established_ns`` is on CLOCK_BOOTTIME; ``handle`` is the tracker's own, the cookie in what
the socket tables tell, else 0; ``group`` is as `groups` makes it. Where that is 0 there is
no connection: arrays that the kernel writes to have such places between others.
"""

GROUP_IPV6 = 1 << 16
DIRECTION_BIT = 17
GROUP_BITS = 18
"""``group``: the local port in 16 bits, then two that tell IP version and direction."""

LISTENER = np.dtype([("netns", "u4"), ("port", "u2"), ("ip_version", "u1")])
"""A listening port, once for each IP version (4 or 6) that it accepts."""

Records: TypeAlias = npt.NDArray[np.void]
"""A one-dimensional array of one of the dtypes above."""

Groups: TypeAlias = npt.NDArray[np.uint32]

PORTS = 65536
"""How many port numbers there are."""

IPV4_PREFIX = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
"""What ::ffff:a.b.c.d begins with."""


def ip_versions(keys: Records) -> npt.NDArray[np.uint8]:
    """The IP version on the wire, 4 or 6, of each key.

    An IPv4 client of a dual-stack socket has a v4-mapped address, so it is 4.
    """
    # As words: three comparisons a key instead of twelve.
    prefix = keys["local_address"].view(np.uint32)[:, :3]
    is_mapped = (prefix == IPV4_PREFIX.view(np.uint32)).all(axis=1)
    return np.where(is_mapped, np.uint8(4), np.uint8(6))


def groups(keys: Records, directions: npt.NDArray[np.integer] | Direction) -> Groups:
    """What each of ``keys``, of dtype `KEY`, is counted under; never 0.

    Args:
        keys: of connections, whose local port is not 0.
        directions: a `Direction` for each, or one for all.
    """
    group = keys["local_port"].astype(np.uint32)
    group |= np.where(ip_versions(keys) == 6, np.uint32(GROUP_IPV6), np.uint32(0))
    group |= np.asarray(directions, np.uint32) << np.uint32(DIRECTION_BIT)
    return group


def directions(group: Groups) -> npt.NDArray[np.uint32]:
    """The `Direction` of each group."""
    return group >> np.uint32(DIRECTION_BIT) & np.uint32(1)
