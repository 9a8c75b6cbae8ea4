# SPDX-License-Identifier: GPL-3.0-only
"""A process that holds sockets and does random things with them, by a seed."""

import contextlib
import ctypes
import random
import socket
import sys
import time
from collections.abc import Callable

from tests.kernel.worker import serve
from tests.support import reset

MOST_SOCKETS = 199
"""From here on a process rather closes than opens."""

LISTENING: tuple[tuple[int, int, int], ...] = (
    (10007, 10009, 10037),
    (10039, 10061, 10067),
    (10069, 10079, 10091),
)
"""The ports of each process: IPv4, IPv6, and both."""

BACKLOG = 1021


class Sockets:
    """What a process holds."""

    def __init__(self, ports: tuple[int, int, int]) -> None:
        self._ports = ports
        self._listeners: dict[int, socket.socket] = {}
        self._connected: list[socket.socket] = []
        self._disconnected: list[socket.socket] = []
        self._random = random.Random()  # noqa: S311  # to be repeated, not to be secret
        self._operations: list[Callable[[], str]] = [
            *[self.connect] * 11,
            *[self.accept] * 11,
            *[self.close] * 3,
            *[self.reset] * 2,
            *[self.half_close] * 2,
            *[self.disconnect] * 2,
            *[self.send] * 2,
            self.wait,
        ]
        self.listen()

    def act(self, seed: int, operations: int, *, may_stop_listening: bool) -> list[str]:
        """Do that many random things; what was done."""
        self._random.seed(seed)
        self.listen()
        choices = self._operations + [self.toggle_listener] * may_stop_listening
        return [self._do(self._random.choice(choices)) for _ in range(operations)]

    def _do(self, operation: Callable[[], str]) -> str:
        if len(self._connected) > MOST_SOCKETS:
            operation = self.close
        try:
            return f"{operation.__name__} {operation()}"
        except OSError as error:  # refused, nothing to accept, reset by the other side
            return f"{operation.__name__}: {error.strerror}"

    def listen(self) -> None:
        """Have all listeners open."""
        for port in self._ports:
            if port not in self._listeners:
                self._listeners[port] = self._listen(port)

    def _listen(self, port: int) -> socket.socket:
        family = socket.AF_INET if port == self._ports[0] else socket.AF_INET6
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port == self._ports[1]:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("" if family == socket.AF_INET else "::", port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener

    def toggle_listener(self) -> str:
        """Close a listener and reset what waits in its queue, or open it again."""
        port = self._random.choice(self._ports)
        if port in self._listeners:
            self._listeners.pop(port).close()
        else:
            self._listeners[port] = self._listen(port)
        return str(port)

    def connect(self) -> str:
        """Connect to any process, with a socket that was connected before if there is one."""
        family, address, port = self._target()
        again = [each for each in self._disconnected if each.family == family]
        client = again[0] if again else socket.socket(family)
        if again:
            self._disconnected.remove(client)
        try:
            client.connect((address, port))
        except OSError:
            client.close()
            raise
        self._connected.append(client)
        return f"{address} {port}"

    def _target(self) -> tuple[socket.AddressFamily, str, int]:
        ipv4, ipv6, both = self._random.choice(LISTENING)
        address = f"127.0.{self._random.randrange(7)}.1"
        return self._random.choice(
            [
                (socket.AF_INET, address, ipv4),
                (socket.AF_INET, address, both),
                (socket.AF_INET6, f"::ffff:{address}", ipv4),
                (socket.AF_INET6, f"::ffff:{address}", both),
                (socket.AF_INET6, "::1", ipv6),
                (socket.AF_INET6, "::1", both),
            ]
        )

    def accept(self) -> str:
        port = self._random.choice(self._ports)
        if port not in self._listeners:
            return f"{port} is closed"
        accepted, _ = self._listeners[port].accept()
        accepted.setblocking(True)
        self._connected.append(accepted)
        return str(port)

    def close(self) -> str:
        """Close with FIN, or with RST where something was sent and not read."""
        return _name(chosen := self._take()) + _after(chosen.close)

    def reset(self) -> str:
        chosen = self._take()
        name = _name(chosen)
        reset(chosen)
        return name

    def half_close(self) -> str:
        chosen = self._random.choice(self._connected)
        chosen.shutdown(socket.SHUT_WR)
        return _name(chosen)

    def disconnect(self) -> str:
        """connect(2) with AF_UNSPEC, which Python's socket has no address for."""
        chosen = self._take()
        name = _name(chosen)
        unspecified = ctypes.create_string_buffer(16)
        ctypes.CDLL(None).connect(chosen.fileno(), unspecified, 16)
        self._disconnected.append(chosen)
        return name

    def send(self) -> str:
        chosen = self._random.choice(self._connected)
        chosen.send(b"unread")
        return _name(chosen)

    def wait(self) -> str:
        time.sleep(self._random.uniform(0, 0.05))
        return ""
