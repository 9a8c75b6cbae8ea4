# SPDX-License-Identifier: GPL-3.0-only
"""The source that the kernel tells: the tracker, seeded from the socket tables."""

import contextlib
from collections.abc import Iterator, Mapping

from tcpexporter import loader, reconcile
from tcpexporter.connections import Records
from tcpexporter.sockets import netns_inode, open_tables
from tcpexporter.tracker import Tracker


class EbpfSource:
    """Connections with the timestamps that the kernel gave them."""

    name = "ebpf"

    def __init__(self, *, netns: str, max_connections: int) -> None:
        """Load and attach the program; takes root, or CAP_BPF and CAP_PERFMON.

        Args:
            netns: ``self``, or ``all`` for every network namespace of the host.
            max_connections: how many the tracker holds, and as many seeds.

        Raises:
            SourceError: that does not work; says why and what would help.
        """
        self.max_connections = max_connections
        only = netns_inode() if netns == "self" else 0
        with contextlib.ExitStack() as undo:
            self._tracker = Tracker(loader.load(loader.Request(max_connections, only)))
            undo.callback(self._tracker.close)
            self._tables = open_tables("auto", netns)
            undo.pop_all()

    def start(self) -> None:
        reconcile.seed(self._tracker, self._established)

    def close(self) -> None:
        self._tracker.close()
        self._tables.close()

    def _established(self) -> Records:
        connections = self._tables.established()
        if not self._tracker.knows_netns:
            connections["key"]["netns"] = 0
        return connections

    def read(self) -> Iterator[Records]:
        return self._tracker.read()

    def listeners(self) -> Records:
        return self._tables.listeners()

    def kernel_events(self) -> Mapping[str, int]:
        return self._tracker.events()
