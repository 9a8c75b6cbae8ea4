# SPDX-License-Identifier: GPL-3.0-only
"""Chooses which client connection to evict when all slots are taken."""

import socket
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Generic, TypeVar

_Client = TypeVar("_Client")


def source_network(host: str) -> str:
    """Return the source network of a client: the IPv4 address, or the IPv6 /64.

    A host can choose the last 64 bits of its IPv6 address. So a limit per IPv6 address
    would not limit a host.
    """
    if ":" not in host:
        return host
    address, _, _scope = host.partition("%")
    return socket.inet_pton(socket.AF_INET6, address)[:8].hex()


class ConnectionSlots(Generic[_Client]):
    """The connection slots by source network, with the time when each client's wait began.

    The network that holds most slots loses a slot first. So the only client of a network
    is evicted only when no network has more than one client.
    """

    def __init__(self) -> None:
        """Start without clients."""
        self._networks: dict[str, dict[_Client, float]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._networks.values()))

    def __iter__(self) -> Iterator[_Client]:
        return chain.from_iterable(self._networks.values())

    def hold(self, client: _Client, network: str, now_s: float) -> None:
        """Allocate a slot to the client, or renew its slot: its wait begins now."""
        clients = self._networks.setdefault(network, {})
        clients.pop(client, None)
        clients[client] = now_s  # added last, so the clients are in order of waiting time

    def free(self, client: _Client, network: str) -> None:
        """Free the client's slot; do nothing if the client has no slot."""
        clients = self._networks.get(network, {})
        clients.pop(client, None)
        if not clients:
            self._networks.pop(network, None)

    def evictable(self, may_evict: Callable[[_Client], bool]) -> _Client | None:
        """Return the client to evict, or None if ``may_evict`` excludes all of them.

        The result is the client that has waited longest in the network with most clients.
        If ``may_evict`` excludes all clients of that network, it is one of the network with
        the next most clients.
        """
        largest_first = sorted(
            self._networks.values(),
            key=lambda clients: (-len(clients), next(iter(clients.values()))),
        )
        return next(filter(may_evict, chain.from_iterable(largest_first)), None)
