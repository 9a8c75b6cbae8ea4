# SPDX-License-Identifier: GPL-3.0-only
"""Clients by the thousand, at several addresses of loopback, who come back when dropped."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ADDRESSES = [f"127.0.1.{number}" for number in range(1, 9)]

IP_BIND_ADDRESS_NO_PORT = 24
"""The port is chosen when connecting, so that each address has all of them: ip(7)."""

CHUNK_BYTES = 1 << 16


@dataclass
class Done:
    """What a crowd has done."""

    connections: int = 0
    requests: int = 0
    """Begun, whole or not, HTTP or not."""
    sent_bytes: int = 0


class Client:
    """One connection."""

    def __init__(self, sock: socket.socket, done: Done) -> None:
        self._sock = sock
        self._done = done
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes, requests: int = 0) -> None:
        """Send all of it, however long that takes."""
        self._done.requests += requests
        await self._loop.sock_sendall(self._sock, data)
        self._done.sent_bytes += len(data)

    async def receive(self) -> bytes:
        """What comes next.

        Raises:
            ConnectionError: nothing any more.
        """
        data = await self._loop.sock_recv(self._sock, CHUNK_BYTES)
        if not data:
            raise ConnectionResetError
        return data

    async def receive_for(self, seconds: float) -> None:
        """Take what comes meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self.receive()

    async def wait_until_dropped(self) -> None:
        """Take what comes, until the other side closes."""
        while True:
            await self.receive()


Behave = Callable[[Client], Awaitable[None]]


async def crowd(
    port: int, behave: Behave, *, clients: int, seconds: float, pause_s: float
) -> Done:
    """Have so many clients behave like this, again and again.

    Args:
        port: Where they connect to.
        behave: What each does with a connection; it is closed afterwards.
        clients: How many connections there are at most at a time.
        seconds: How long it goes on.
        pause_s: How long a client waits before it connects again; they come one by one
            over the same time.
    """
    done = Done()
    addresses = itertools.cycle(ADDRESSES)

    async def one(number: int, address: str) -> None:
        await asyncio.sleep(pause_s * number / clients)
        while True:
            with contextlib.suppress(OSError), _socket(address) as sock:
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
                done.connections += 1
                await behave(Client(sock, done))
            await asyncio.sleep(pause_s)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(one(each, next(addresses)) for each in range(clients)))
    return done


def _socket(address: str) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0))
    return sock
