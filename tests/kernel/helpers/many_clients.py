# SPDX-License-Identifier: GPL-3.0-only
"""Connections from thousands of addresses, and their clients as ss(8) shows them.

This module parses the output of ss without any code of the product.
"""

import socket
import subprocess
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import NamedTuple, Self

IP_BIND_ADDRESS_NO_PORT = 24
"""ip(7); Python has it since 3.12."""

PREFIX = "2001:db8::/32"
"""The IPv6 addresses that `route_ipv6` makes local."""

PEERS = (
    "ss -Htn state established '( sport = :{port} )' | awk '{{print $4}}'"
    r" | sed -E 's/:[0-9]+$//; s/^\[(::ffff:)?//; s/\]$//; s/%.*//'"
)
"""A command that prints the remote address of each connection of a port."""


class Clients(NamedTuple):
    """How many clients a port has, and how many connections the client with most has."""

    number: int
    largest: int


def route_ipv6() -> None:
    """Make all addresses of `PREFIX` local in this namespace."""
    command = ["ip", "-6", "route", "add", "local", PREFIX, "dev", "lo"]
    subprocess.run(command, check=True)


def ipv4_addresses(number: int) -> list[str]:
    return [f"127.{1 + at // 199}.{at % 199}.{1 + at % 7}" for at in range(number)]


def ipv6_addresses(networks: int, each: int) -> list[str]:
    """Return addresses of /64 networks, some of which are in the same /56."""
    return [
        f"2001:db8:{at // 101:x}:{at % 101 * 103:x}::{2 * host + 1:x}"
        for at in range(networks)
        for host in range(each)
    ]


def distinct(port: int) -> int:
    """Return how many remote addresses ss(8) shows at a local port."""
    command = PEERS.format(port=port) + " | sort -u | wc -l"
    return int(subprocess.check_output(["sh", "-c", command]))


def clients(port: int, ipv4_bits: int = 32, ipv6_bits: int = 64) -> dict[str, Clients]:
    """Return the clients of a local port as ss(8) shows them, by IP version.

    A client is a network with a prefix of this length.
    """
    shown = subprocess.check_output(["sh", "-c", PEERS.format(port=port)], text=True)
    found = {"4": Counter[str](), "6": Counter[str]()}
    for text, number in Counter(shown.split()).items():
        address = ip_address(text)
        bits = ipv4_bits if address.version == 4 else ipv6_bits
        network = str(ip_network((text, bits), strict=False))
        found[str(address.version)][network] += number
    return {
        version: Clients(len(each), max(each.values()))
        for version, each in found.items()
        if each
    }


class Server:
    """A dual-stack listener, and connections to it from many addresses."""

    def __init__(self) -> None:
        self.listener = socket.socket(socket.AF_INET6)
        self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind(("::", 0))
        self.listener.listen(512)
        self.port: int = self.listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []

    def connect(self, addresses: Iterable[str], *, mapped: bool = False) -> None:
        """Open one connection from each address.

        Args:
            addresses: of the clients.
            mapped: whether clients of IPv4 use AF_INET6 and ::ffff:a.b.c.d.
        """
        for address in addresses:
            target = "::1" if ":" in address else "127.0.0.1"
            family = socket.AF_INET6 if ":" in address or mapped else socket.AF_INET
            prefix = "::ffff:" if mapped and ":" not in address else ""
            client = socket.socket(family)
            client.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            client.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
            client.bind((prefix + address, 0))
            client.connect((prefix + target, self.port))
            self._pairs.append((client, self.listener.accept()[0]))

    def close_one_in(self, number: int) -> None:
        """Close one in so many connections."""
        for pair in self._pairs[::number]:
            for each in pair:
                each.close()
        del self._pairs[::number]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_one_in(1)
        self.listener.close()
