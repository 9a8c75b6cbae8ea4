# SPDX-License-Identifier: GPL-3.0-only
"""Array dtypes for connections and listeners, and the values of their fields."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import TIME_SHIFT

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
        ("handle", "u8"),
        ("key", KEY),
        ("is_outbound", "u4"),
        ("pad", "u4"),
        ("cgroup", "u8"),
    ]
)
"""``struct connection``: a slot of the tracker, which the BPF program writes to.

``handle`` identifies the slot to the BPF program: bpf/tcp_tracker.c. ``is_outbound`` is a
`Direction`. ``cgroup`` is as in `SOCKET`. Whether the slot has a connection is in the
slot's element of `Words`.
"""

SOCKET = np.dtype(
    [
        ("established_ns", "u8"),
        ("cookie", "u8"),
        ("key", KEY),
        ("is_outbound", "u4"),
        ("pad", "u4"),
        ("cgroup", "u8"),
    ]
)
"""A connection as the socket tables report it.

``established_ns`` is on CLOCK_BOOTTIME. ``key`` and ``is_outbound`` are as in `CONNECTION`.
``cookie`` is the number that the kernel gives to a socket and to no other one until the
host boots again (sock_gen_cookie in the kernel's net/core/sock_diag.c); 0 if it is unknown.
``cgroup`` is the number of the cgroup (version 2) in which the socket was made; 0 if it is
unknown, or not counted separately.
"""

SERIES_BITS = 18
"""Number of bits of a series number, which is the lower part of a word of `Words`."""

SERIES_MASK = (1 << SERIES_BITS) - 1

CLOSED = np.uint64(1 << SERIES_BITS)
"""The word of a slot whose connection has closed."""

LISTENER = np.dtype(
    [("netns", "u4"), ("port", "u2"), ("ip_version", "u1"), ("cgroup", "u8")]
)
"""A listening port and an IP version, 4 or 6, that its socket accepts.

The other fields are as in `KEY` and `SOCKET`.
"""

Records: TypeAlias = npt.NDArray[np.void]
"""A one-dimensional array of one of the dtypes above."""

Words: TypeAlias = npt.NDArray[np.uint64]
"""One word for each slot: the number of the connection's series, and its time.

The time is when the connection was established, on CLOCK_BOOTTIME. The number is 0 if the
slot has no connection. The word is 0 if the slot was never used.
"""

Numbers: TypeAlias = npt.NDArray[np.uint32]
"""A one-dimensional array of series numbers."""

IPV4_PREFIX = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)
"""The first 12 bytes of ::ffff:a.b.c.d."""


def ip_versions(keys: Records, end: str = "local_address") -> npt.NDArray[np.uint8]:
    """Return the IP version on the wire, 4 or 6, of each key.

    An IPv4 client of a dual-stack socket has v4-mapped addresses: the result is 4.

    Args:
        keys: of dtype `KEY`.
        end: the field of the address.
    """
    # Words instead of bytes: three comparisons per key instead of twelve.
    prefix = np.ascontiguousarray(keys[end]).view(np.uint32)[:, :3]
    is_mapped = (prefix == IPV4_PREFIX.view(np.uint32)).all(axis=1)
    return np.where(is_mapped, np.uint8(4), np.uint8(6))


def words(numbers: Numbers, established_ns: npt.NDArray[np.uint64]) -> Words:
    """Return the words for series numbers and times in ns of CLOCK_BOOTTIME."""
    time = established_ns.astype(np.uint64) >> np.uint64(TIME_SHIFT)
    return time << np.uint64(SERIES_BITS) | numbers


def numbers(words: Words) -> Numbers:
    """Return the series number of each word; 0: no connection."""
    return (words & np.uint64(SERIES_MASK)).astype(np.uint32)


def times_ns(words: Words) -> npt.NDArray[np.uint64]:
    """Return the times of words in ns, each up to 8,191 ns too early."""
    return words >> np.uint64(SERIES_BITS) << np.uint64(TIME_SHIFT)
