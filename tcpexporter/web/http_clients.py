# SPDX-License-Identifier: GPL-3.0-only
"""Keeps the connections of all clients together within limits on slots and memory."""

import asyncio
import gc
from typing import TYPE_CHECKING

from tcpexporter.host import malloc
from tcpexporter.web.fair_share import ConnectionSlots

if TYPE_CHECKING:  # connection imports this module
    from tcpexporter.web.connection import Connection

MAX_CONNECTIONS = 256
"""Maximum number of client connections; the limit of descriptors is usually 1,024."""

MANY_CONNECTIONS = 64
"""After this many open connections, memory is returned when a quarter of them is left, and
again when a quarter of those is left, until one is left. The last ones may have the largest
responses."""

MAX_UNSENT_BYTES = 16 << 20
"""Limit for response data that the kernel has not accepted, of all clients together."""


class HttpClients:
    """The connections of all clients."""

    def __init__(self) -> None:
        """Start without clients."""
        self._slots = ConnectionSlots["Connection"]()
        self._has_left = asyncio.Event()
        self._return_at = 0
        """Memory is returned when so many connections are left; 0: not until there are
        `MANY_CONNECTIONS`."""

    def add(self, client: "Connection") -> None:
        """Allocate a slot to a new client; if all are taken, evict another client."""
        if len(self._slots) >= MAX_CONNECTIONS:
            self._evict_one()
        self.renew(client)

    def renew(self, client: "Connection") -> None:
        """Renew the slot of a client: its wait begins now."""
        self._slots.hold(client, client.network, asyncio.get_running_loop().time())

    def remove(self, client: "Connection") -> None:
        """Free the slot of a client; do nothing if it has none."""
        self._slots.free(client, client.network)
        self._has_left.set()

    def limit_unsent_data(self, newest: "Connection") -> None:
        """Drop a slow client if there are more than `MAX_UNSENT_BYTES` of unsent data.

        `ConnectionSlots.evictable` chooses the client.

        Args:
            newest: The client that has just become slow. Its data are not counted, and it
                is not dropped.
        """
        unsent = sum(each.unsent_bytes for each in self._slots if each is not newest)
        if unsent > MAX_UNSENT_BYTES:
            slow = self._slots.evictable(lambda each: each.is_slow and each is not newest)
            if slow:
                slow.drop()

    def return_memory(self) -> None:
        """Return memory to the kernel, as `MANY_CONNECTIONS` describes it."""
        if len(self._slots) >= MANY_CONNECTIONS:
            self._return_at = MANY_CONNECTIONS // 4
        elif self._return_at and len(self._slots) <= self._return_at:
            self._return_at //= 4
            gc.collect()  # the objects of a connection refer to each other
            malloc.return_memory()

    def stop(self) -> None:
        """Close each connection when its response is complete."""
        for each in list(self._slots):
            each.stop()

    def drop(self) -> None:
        """Reset each connection."""
        for each in list(self._slots):
            each.drop()

    async def wait_until_none(self) -> None:
        """Return when no client is connected."""
        while self._slots:
            self._has_left.clear()
            await self._has_left.wait()

    def _evict_one(self) -> None:
        # Clients that are being answered come last: the response takes a few turns of the
        # event loop, and longer only while a password is checked.
        for may_evict in (lambda each: not each.is_being_answered, lambda _: True):
            if evicted := self._slots.evictable(may_evict):
                evicted.drop()
                return
