# SPDX-License-Identifier: GPL-3.0-only
"""Runs thousands of clients at several loopback addresses; dropped clients reconnect."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ADDRESSES = [f"127.0.1.{number}" for number in range(1, 9)]

IP_BIND_ADDRESS_NO_PORT = 24
"""Socket option: the kernel chooses the port at connect(2), so each address has all
ports."""

CHUNK_BYTES = 1 << 16


@dataclass
class Done:
    """Totals of all clients."""

    connections: int = 0
    requests: int = 0
    """Requests that were begun, whether they are complete or valid HTTP or not."""
    sent_bytes: int = 0


class Client:
    """A client with one connection."""

    def __init__(self, sock: socket.socket, done: Done) -> None:
        self._sock = sock
        self._done = done
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes, requests: int = 0) -> None:
        """Send all of ``data``, which may block for a long time."""
        self._done.requests += requests
        await self._loop.sock_sendall(self._sock, data)
        self._done.sent_bytes += len(data)

    async def receive(self) -> bytes:
        """Return the next bytes.

        Raises:
            ConnectionError: the server has closed the connection.
        """
        data = await self._loop.sock_recv(self._sock, CHUNK_BYTES)
        if not data:
            raise ConnectionResetError
        return data

    async def receive_for(self, seconds: float) -> None:
        """Read for this time and discard the bytes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self.receive()

    async def wait_until_dropped(self) -> None:
        """Read and discard bytes until the server closes the connection."""
        while True:
            await self.receive()


Behave = Callable[[Client], Awaitable[None]]


async def run_clients(
    port: int, behave: Behave, *, clients: int, seconds: float, pause_s: float
) -> Done:
    """Run clients, each of which uses one connection after another.

    Args:
        port: Port of the server on loopback.
        behave: The actions of a client on a connection, which is closed afterwards.
        clients: Maximum number of connections at a time.
        seconds: Time until all clients stop.
        pause_s: Pause of a client before it connects again. The first connections are
            spread over the same time.
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
