# SPDX-License-Identifier: GPL-3.0-only
"""The connection record, as the BPF program writes it and as numpy reads it."""

import enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class Direction(enum.IntEnum):
    """Which end opened a connection; the values of the C enum."""

    INBOUND = 1
    OUTBOUND = 2


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
the inode of the network namespace, 0 when it is not known.
"""

VALUE = np.dtype(
    [
        ("established_ns", "u8"),
        ("socket", "u4"),
        ("direction", "u1"),
        ("pad", "u1", 3),
    ]
)
"""``struct connection_value``: what is known about a connection.

``established_ns`` is on CLOCK_BOOTTIME; ``socket`` tells two sockets with one
key apart and is 0 when it is not known; ``direction`` is a `Direction`.
"""

CONNECTION = np.dtype([("key", KEY), ("value", VALUE)])
"""A connection: its key and what is known about it."""

LISTENER = np.dtype([("netns", "u4"), ("port", "u2"), ("ip_version", "u1")])
"""A listening port, once for each IP version (4 or 6) that it accepts."""

Records: TypeAlias = npt.NDArray[np.void]
"""A one-dimensional array of one of the dtypes above."""

PORTS = 65536
"""How many port numbers there are."""

IPV4_PREFIX = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
"""What ::ffff:a.b.c.d begins with."""

_KEY_BYTES = np.dtype((np.void, KEY.itemsize))


def ip_versions(keys: Records) -> npt.NDArray[np.uint8]:
    """The IP version on the wire, 4 or 6, of each key.

    An IPv4 client of a dual-stack socket has a v4-mapped address, so it is 4.
    """
    # As words: three comparisons a key instead of twelve.
    prefix = keys["local_address"].view(np.uint32)[:, :3]
    is_mapped = (prefix == IPV4_PREFIX.view(np.uint32)).all(axis=1)
    return np.where(is_mapped, np.uint8(4), np.uint8(6))


def contains(keys: Records, among: Records) -> npt.NDArray[np.bool_]:
    """Whether each of ``keys`` is one of ``among``; both of dtype `KEY`."""
    return locate(keys, among) >= 0


def locate(keys: Records, among: Records) -> npt.NDArray[np.intp]:
    """The index in ``among`` of each of ``keys``, -1 where it is not there.

    Both are of dtype `KEY`. Keys have no padding, so they are the same
    connection exactly when all their bytes are the same.
    """
    if not len(among):
        return np.full(len(keys), -1, np.intp)
    wanted = np.ascontiguousarray(keys).view(_KEY_BYTES)
    present = np.ascontiguousarray(among).view(_KEY_BYTES)
    order = np.argsort(present)
    place = np.searchsorted(present, wanted, sorter=order)
    found = order[np.minimum(place, len(order) - 1)]
    return np.where(present[found] == wanted, found, -1)
