# SPDX-License-Identifier: GPL-3.0-only
"""Defines which properties of connections are counted separately, by the settings.

Start-up imports this module before numpy, so that the loader starts early: see `startup`.
"""

import enum
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

SECRET = (int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8)))
"""The key of all hashes of this process (see `identity`), as two numbers of 64 bits."""

PORTS = 65536
"""Number of possible ports, including 0."""

TIME_SHIFT = 13
"""Times in words, and bounds of lifetimes, are in units of 2^13 ns."""

SERIES_FIRST = 5
"""The lowest number that a series can get. The lower ones are those of folded series."""

NO_LISTENER = (0, 0)
"""Namespace and port, if the exporter does not listen in a namespace that it counts."""

OWNER_LABELS = ("unit", "container", "pod")
"""The labels that are derived from a socket's cgroup."""

ClientMasks: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""The masks of IPv4 addresses (as ::ffff:a.b.c.d) and of IPv6 addresses."""


class Direction(enum.IntEnum):
    """Which end opened a connection. The values are those of ``is_outbound``."""

    INBOUND = 0
    OUTBOUND = 1


class OutboundPort(enum.IntEnum):
    """Which port is part of the series of an outbound connection."""

    NONE = 0
    LOCAL = 1
    REMOTE = 2


@dataclass(frozen=True)
class Parts:
    """What the settings require to be counted separately."""

    outbound_port: OutboundPort
    by_netns: bool
    """Whether network namespaces are counted separately."""
    own_listener: tuple[int, int] = NO_LISTENER
    """Namespace and port of the exporter's own listener, which is not counted."""
    client_masks: ClientMasks | None = None
    """Which bits of an address identify a client; None: clients are not counted."""
    by_cgroup: bool = False
    """Whether cgroups are counted separately."""


def kernel_parts(
    directions: Sequence[Direction],
    labels: Sequence[str],
    own_listener: tuple[int, int] = NO_LISTENER,
    client_masks: ClientMasks | None = None,
    *,
    by_cgroup: bool = False,
) -> Parts:
    """Return what a source has to count separately for a selection with these fields.

    ``by_cgroup`` is true if cgroups are required for another purpose than labels.
    """
    if Direction.OUTBOUND not in directions:
        outbound_port = OutboundPort.NONE
    elif "remote_port" in labels:
        outbound_port = OutboundPort.REMOTE
    else:
        outbound_port = OutboundPort.LOCAL
    return Parts(
        outbound_port,
        by_netns="netns" in labels,
        by_cgroup=by_cgroup or has_owner(labels),
        own_listener=own_listener,
        client_masks=client_masks,
    )


def has_owner(labels: Sequence[str]) -> bool:
    """Return whether some labels are derived from a socket's cgroup."""
    return not {*OWNER_LABELS}.isdisjoint(labels)


def client_masks(ipv4_bits: int, ipv6_bits: int) -> ClientMasks:
    """Return the masks for prefixes of these lengths."""
    return _mask(96 + ipv4_bits), _mask(ipv6_bits)


def _mask(bits: int) -> tuple[int, int]:
    """Return a mask for the first bits of an address, as two words of its bytes."""
    octets = ((1 << bits) - 1 << 128 - bits).to_bytes(16, "big")
    halves = octets[:8], octets[8:]
    first, second = (int.from_bytes(each, sys.byteorder) for each in halves)
    return first, second


def time_units(seconds: float) -> int:
    """Return a duration in the units of the time in a word, rounded down."""
    return round(seconds * 1e9) >> TIME_SHIFT
