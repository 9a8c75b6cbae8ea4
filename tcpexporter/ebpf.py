# SPDX-License-Identifier: GPL-3.0-only
"""The source that the kernel tells: the tracker, kept right by the socket tables."""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tcpexporter import loader, namespaces
from tcpexporter.connections import Records
from tcpexporter.reconcile import Reconciler, Tables, seed
from tcpexporter.sockets import SocketTables, open_tables
from tcpexporter.sources import Report
from tcpexporter.tracker import Tracker

log = logging.getLogger(__name__)


class _WithoutNetns:
    """Socket tables in the eyes of a program that cannot tell namespaces apart.

    A connection of a namespace that the tables do not cover cannot be told from one
    whose closing was missed, so they say that they cover none.
    """

    def __init__(self, tables: SocketTables) -> None:
        self._tables = tables

    def established(self) -> Records:
        connections = self._tables.established()
        connections["key"]["netns"] = 0
        return connections

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.empty(0, np.uint32)


class EbpfSource:
    """Connections with the timestamps that the kernel gave them."""

    name = "ebpf"

    def __init__(
        self,
        *,
        netns: str,
        max_connections: int,
        reconcile_interval_s: float,
        reconcile_cpu_share: float,
    ) -> None:
        """Load and attach the program; takes root, or CAP_BPF and CAP_PERFMON.

        Args:
            netns: as `namespaces.find` takes it, or ``all`` for every one of the host.
            max_connections: how many the tracker holds, and as many seeds.
            reconcile_interval_s: as `Reconciler` has it.
            reconcile_cpu_share: likewise.

        Raises:
            SourceError: that does not work; says why and what would help.
        """
        self._max_connections = max_connections
        self._refused_is_told = False
        only = 0 if netns == "all" else namespaces.inode(namespaces.find(netns))
        with contextlib.ExitStack() as undo:
            self._tracker = Tracker(loader.load(loader.Request(max_connections, only)))
            undo.callback(self._tracker.close)
            self._tables = open_tables("auto", netns)
            undo.pop_all()
        knows_netns = self._tracker.knows_netns
        self._compared: Tables = (
            self._tables if knows_netns else _WithoutNetns(self._tables)
        )
        self._reconciler = Reconciler(
            self._tracker,
            self._compared,
            interval_s=reconcile_interval_s,
            cpu_share=reconcile_cpu_share,
        )

    def start(self) -> None:
        seed(self._tracker, self._compared)
        self._tell_refused()
        self._reconciler.start()

    def close(self) -> None:
        self._reconciler.close()
        self._tracker.close()
        self._tables.close()

    def read(self) -> Iterator[Records]:
        return self._tracker.read()

    def listeners(self) -> Records:
        return self._tables.listeners()

    def report(self) -> Report:
        self._tell_refused()
        return Report(
            max_connections=self._max_connections,
            kernel_events=self._tracker.events(),
            missed_events=self._tracker.missed_events(),
            seeded_connections=self._tracker.seeds_read,
            refused_seeds=self._tracker.seeds_refused,
            reconciliation=self._reconciler.state,
        )

    def _tell_refused(self) -> None:
        refused = self._tracker.events()["refused"] + self._tracker.seeds_refused
        if refused and not self._refused_is_told:
            log.warning(
                "there is no room for %s connections: raise --max-connections", refused
            )
            self._refused_is_told = True
