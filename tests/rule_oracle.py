# SPDX-License-Identifier: GPL-3.0-only
"""Decides one connection at a time, in plain Python, whether it matches a rule."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, TypeAlias

import numpy as np

from tcpexporter.connections.expected import End, Rule
from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import IPV4_PREFIX, SOCKET, Records

Address: TypeAlias = IPv4Address | IPv6Address


class Connection(NamedTuple):
    """A connection as ss(8) shows it."""

    local: Address
    local_port: int
    remote: Address
    remote_port: int
    direction: Direction = Direction.INBOUND


def connection(local: str, remote: str, direction: int = 0) -> Connection:
    """Return a connection between two ends, such as 192.0.2.1:443 or [::1]:443."""
    return Connection(*_end(local), *_end(remote), Direction(direction))


def _end(text: str) -> tuple[Address, int]:
    address, _, port = text.rpartition(":")
    parsed = ip_address(address.strip("[]"))
    is_mapped = isinstance(parsed, IPv6Address) and parsed.ipv4_mapped
    return is_mapped or parsed, int(port)


def matches(rule: Rule, each: Connection) -> bool:
    """Return whether a connection matches a rule, whatever its unit is."""
    return (
        _is_at(rule.local, each.local, each.local_port)
        and _is_at(rule.remote, each.remote, each.remote_port)
        and rule.direction in (None, each.direction)
    )


def _is_at(end: End, address: Address, port: int) -> bool:
    is_there = end.network is None or address in end.network
    return is_there and end.first_port <= port <= end.last_port


def records(connections: Iterable[Connection]) -> Records:
    """Return the connections as records of dtype `SOCKET`; none has a time."""
    listed = list(connections)
    made = np.zeros(len(listed), SOCKET)
    for record, each in zip(made, listed, strict=True):
        record["is_outbound"] = each.direction
        key = record["key"]
        key["local_port"], key["remote_port"] = each.local_port, each.remote_port
        for name, address in (("local", each.local), ("remote", each.remote)):
            prefix = IPV4_PREFIX.tobytes() if address.version == 4 else b""
            key[f"{name}_address"] = np.frombuffer(prefix + address.packed, np.uint8)
    return made
