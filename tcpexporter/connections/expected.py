# SPDX-License-Identifier: GPL-3.0-only
"""Defines the rules that expect connections: those between certain addresses and ports.

`config.settings` imports this module, so it does not import numpy: see `startup`.
"""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple, TypeAlias

from tcpexporter.connections.parts import PORTS, Direction

Network: TypeAlias = IPv4Network | IPv6Network

V4_MAPPED = IPv6Network("::ffff:0:0/96")
"""The addresses of IPv4 in a key; no IPv6 network of a rule includes them."""


class End(NamedTuple):
    """What a rule expects of one end of a connection."""

    network: Network | None = None
    """The network that contains the address; None: any address."""
    first_port: int = 0
    last_port: int = PORTS - 1


ANY = End()


@dataclass(frozen=True)
class Rule:
    """Which connections are expected, and how many."""

    name: str
    text: str
    """The rule as the operator wrote it, with its name."""
    remote: End = ANY
    local: End = ANY
    unit: str | None = None
    """The systemd unit that owns the socket; None: any owner."""
    direction: Direction | None = None
    """None: both."""
    minimum: int = 1
    """The number of connections that the rule requires."""

    def __str__(self) -> str:
        return self.text
