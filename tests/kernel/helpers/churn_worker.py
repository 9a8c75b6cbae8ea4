# SPDX-License-Identifier: GPL-3.0-only
"""A process that opens and closes connections as fast as possible, on one CPU."""

import itertools
import os
import random
import resource
import socket
import sys
from collections import deque

from tests.kernel.helpers.worker import serve
from tests.support import reset

HELD = 41
"""Number of connections that stay open; each new one closes the oldest one."""

MOST_DESCRIPTORS = 127
"""Limit of open files, and so of sockets, of such a process."""

AT_ONE_ADDRESS = 101
"""Number of connections to an address before the next address is used. An address would
run out of ports, because closed connections stay in TIME_WAIT."""

BACKLOG = 127


class Churn:
    """Connections from this process to itself."""

    def __init__(self, cpu: int, port: int) -> None:
        os.sched_setaffinity(0, {cpu})
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_DESCRIPTORS, MOST_DESCRIPTORS))
        self._listener = socket.create_server(("", port), backlog=BACKLOG)
        self._port = port
        self._addresses = itertools.cycle(
            f"127.{x}.{y}.1" for x in range(1, 251) for y in range(1, 251)
        )
        self._random = random.Random(port)  # noqa: S311  # repeatable
        self._held: deque[tuple[socket.socket, socket.socket]] = deque()

    def act(self, connections: int) -> int:
        """Open this many connections, and close others.

        Returns:
            The number of sockets that entered or left ESTABLISHED.
        """
        changes = 0
        for number in range(connections):
            if number % AT_ONE_ADDRESS == 0:
                address = next(self._addresses)
            changes += self._open(address)
            if len(self._held) > HELD:
                changes += self._close(*self._held.popleft())
        return changes

    def _open(self, address: str) -> int:
        client = socket.create_connection((address, self._port))
        server, _ = self._listener.accept()
        self._held.append((client, server))
        return 2

    def _close(self, client: socket.socket, server: socket.socket) -> int:
        """Close a connection by FIN or by RST, beginning at a random end. Unread data
        causes the RST in one of three cases."""
        first, second = self._random.choice([(client, server), (server, client)])
        way = self._random.choice(["FIN", "RST", "unread"])
        if way == "unread":
            second.send(b"unread")
        if way == "RST":
            reset(first)
        first.close()
        second.close()
        return 2


if __name__ == "__main__":
    serve(Churn(*map(int, sys.argv[1:])).act)
