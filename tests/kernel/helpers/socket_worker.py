# SPDX-License-Identifier: GPL-3.0-only
"""A process that holds sockets and executes random operations, repeatable by a seed."""

import ctypes
import random
import re
import socket
import sys
import time
from collections.abc import Callable

from tests.kernel.helpers.many_clients import IP_BIND_ADDRESS_NO_PORT
from tests.kernel.helpers.worker import serve
from tests.support import reset

LISTENING = (
    (10007, 10009, 10037),
    (10039, 10061, 10067),
    (10069, 10079, 10091),
)
"""The ports of each process: one for IPv4, one for IPv6, one for both."""

BACKLOG = 1021

SOURCE = re.compile(r"(::ffff:)?127\.0\.")
"""The beginning of a client's address, if it is one of several."""

MOST_CONNECTIONS = 199
"""Limit of open ends of a process; when it is reached, each operation also closes an
end."""


class Sockets:
    """The sockets of one process."""

    def __init__(self, ports: tuple[int, int, int]) -> None:
        self._ports = ports
        self._listeners: dict[int, socket.socket] = {}
        self._connected: list[socket.socket] = []
        self._disconnected: list[socket.socket] = []
        self._random = random.Random()  # noqa: S311  # noqa: S311  # repeatable
        self._operations = (
            *[self.connect] * 11,
            *[self.accept] * 11,
            *[self.close] * 3,
            *[self.reset] * 2,
            *[self.half_close] * 2,
            *[self.disconnect] * 2,
            *[self.send] * 2,
        )
        self.listen()

    def act(
        self,
        seed: int,
        operations: int,
        *,
        longest_pause_s: float,
        may_stop_listening: bool,
    ) -> list[str]:
        """Listen at every port, then execute this many random operations; return their
        descriptions."""
        self._random.seed(seed)
        self.listen()
        choices = [*self._operations, *[self.stop_or_listen] * may_stop_listening]
        done = []
        for _ in range(operations):
            done.append(self._do(self._random.choice(choices)))
            time.sleep(self._random.uniform(0, longest_pause_s))
        return done

    def _do(self, operation: Callable[[], str]) -> str:
        if len(self._connected) >= MOST_CONNECTIONS:
            operation = self.close
        try:
            return f"{operation.__name__} {operation()}"
        # refused, no connection to accept, or reset by the other end
        except OSError as error:
            return f"{operation.__name__} ({error})"

    def listen(self) -> None:
        for port in self._ports:
            if port not in self._listeners:
                self._listeners[port] = self._listen(port)

    def _listen(self, port: int) -> socket.socket:
        family = socket.AF_INET if port == self._ports[0] else socket.AF_INET6
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port == self._ports[1]:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("", port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    def stop_or_listen(self) -> str:
        """Close a listener, which resets connections not yet accepted, or open it again."""
        port = self._random.choice(self._ports)
        if port in self._listeners:
            self._listeners.pop(port).close()
        else:
            self.listen()
        return str(port)

    def connect(self) -> str:
        """Connect to a random process, if possible with a socket that was disconnected."""
        family, address, port = self._target()
        client = self._unconnected(family)
        try:
            if source := SOURCE.match(address):
                # The kernel chooses the port when the client connects, as without bind(2).
                client.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                client.bind((f"{source[0]}0.{self._random.randrange(1, 4)}", 0))
            client.connect((address, port))
        except OSError:
            client.close()
            raise
        self._connected.append(client)
        return f"{_port(client)} to {address} {port}"

    def _unconnected(self, family: socket.AddressFamily) -> socket.socket:
        if family == socket.AF_INET and self._disconnected:
            return self._disconnected.pop()
        return socket.socket(family)

    def _target(self) -> tuple[socket.AddressFamily, str, int]:
        ipv4, ipv6, both = self._random.choice(LISTENING)
        address = f"127.0.{self._random.randrange(7)}.1"
        return self._random.choice(
            (
                (socket.AF_INET, address, ipv4),
                (socket.AF_INET, address, both),
                (socket.AF_INET6, f"::ffff:{address}", ipv4),
                (socket.AF_INET6, f"::ffff:{address}", both),
                (socket.AF_INET6, "::1", ipv6),
                (socket.AF_INET6, "::1", both),
            )
        )

    def accept(self) -> str:
        port = self._random.choice(self._ports)
        if port not in self._listeners:
            raise OSError(f"{port} is closed")
        accepted, _ = self._listeners[port].accept()
        self._connected.append(accepted)
        return str(port)

    def close(self) -> str:
        """Close with FIN, or with RST if received data is unread."""
        chosen = self._take()
        port = _port(chosen)
        chosen.close()
        return port

    def reset(self) -> str:
        chosen = self._take()
        port = _port(chosen)
        reset(chosen)
        return port

    def disconnect(self) -> str:
        """Call connect(2) with AF_UNSPEC, an address that Python's socket does not
        support."""
        chosen = self._take()
        port = _port(chosen)
        unspecified = ctypes.create_string_buffer(16)
        ctypes.CDLL(None).connect(chosen.fileno(), unspecified, 16)
        # A socket that was connected to ::ffff:a.b.c.d cannot use IPv6 any more.
        if chosen.family == socket.AF_INET:
            self._disconnected.append(chosen)
        return port

    def half_close(self) -> str:
        chosen = self._choose()
        chosen.shutdown(socket.SHUT_WR)
        return _port(chosen)

    def send(self) -> str:
        chosen = self._choose()
        chosen.send(b"unread")
        return _port(chosen)

    def _choose(self) -> socket.socket:
        if not self._connected:
            raise OSError("none is connected")
        return self._random.choice(self._connected)

    def _take(self) -> socket.socket:
        chosen = self._choose()
        self._connected.remove(chosen)
        return chosen


def _port(chosen: socket.socket) -> str:
    return str(chosen.getsockname()[1])


if __name__ == "__main__":
    serve(Sockets(LISTENING[int(sys.argv[1])]).act)
