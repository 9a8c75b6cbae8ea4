# SPDX-License-Identifier: GPL-3.0-only
"""A tracker in this process, and socket tables with something between the looks."""

import socket
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from tcpexporter import loader, namespaces
from tcpexporter.connections import Records
from tcpexporter.sockets import open_tables
from tcpexporter.tracker import Tracker
from tests.support import Peers, reset


def attach(max_connections: int = 1024, *, lose_one_in: int = 0) -> Tracker:
    """A tracker of this namespace that is not seeded."""
    request = loader.Request(max_connections, namespaces.inode(), lose_one_in)
    return Tracker(loader.load(request))


class Looks:
    """The socket tables; after each look is taken, the next of ``after`` happens."""

    def __init__(self, *after: Callable[[], object], hide_from_look: int = 0) -> None:
        self.taken = 0
        self._tables = open_tables("sock_diag", "self")
        self._after = list(after)
        self._hide_from_look = hide_from_look

    def established(self) -> Records:
        look = self._tables.established()
        self.taken += 1
        if self._after:
            self._after.pop(0)()
        return look[:0] if self.taken == self._hide_from_look else look

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()


def everything(chunks: Iterator[Records]) -> Records:
    return np.concatenate([chunk.copy() for chunk in chunks])


def at_port(tracker: Tracker, port: int) -> Records:
    """All that the tracker has of a local port, from events and seeds."""
    known = everything(tracker.read())
    here: Records = known[known["key"]["local_port"] == port]
    return here


class Reusable:
    """A connection whose address pair can be used again at once."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.open()

    def open(self) -> None:
        self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.client.bind(("127.0.0.1", 61999))
        self.client.connect(("127.0.0.1", self._peers.port))
        self.server, _ = self._peers.listener.accept()

    def close(self) -> None:
        if self.client.fileno() < 0:
            return
        reset(self.client)
        self.server.close()

    def reopen(self) -> None:
        self.close()
        self.open()
