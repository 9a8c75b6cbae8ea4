# SPDX-License-Identifier: GPL-3.0-only
"""The source that the kernel tells: the tracker, kept right by the socket tables."""

import contextlib
import logging
from collections.abc import Iterator

from tcpexporter import loader
from tcpexporter.connections import Records
from tcpexporter.reconcile import Reconciler, seed
from tcpexporter.sockets import netns_inode, open_tables
from tcpexporter.sources import Report
from tcpexporter.tracker import Tracker

log = logging.getLogger(__name__)


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
            netns: ``self``, or ``all`` for every network namespace of the host.
            max_connections: how many the tracker holds, and as many seeds.
            reconcile_interval_s: as `Reconciler` has it.
            reconcile_cpu_share: likewise.

        Raises:
            SourceError: that does not work; says why and what would help.
        """
        self._max_connections = max_connections
        self._refused_is_told = False
        only = netns_inode() if netns == "self" else 0
        with contextlib.ExitStack() as undo:
            self._tracker = Tracker(loader.load(loader.Request(max_connections, only)))
            undo.callback(self._tracker.close)
            self._tables = open_tables("auto", netns)
            undo.pop_all()
        self._reconciler = Reconciler(
            self._tracker,
            self._look,
            interval_s=reconcile_interval_s,
            cpu_share=reconcile_cpu_share,
        )

    def start(self) -> None:
        if refused := seed(self._tracker, self._look):
            self._tell_refused(refused)
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
        events = self._tracker.events()
        if events["refused"]:
            self._tell_refused(events["refused"])
        return Report(
            max_connections=self._max_connections,
            kernel_events=events,
            missed_events=self._tracker.missed_events(),
            seeded_connections=self._tracker.seeds_read,
            reconciliation=self._reconciler.state,
        )

    def _look(self) -> Records:
        connections = self._tables.established()
        if not self._tracker.knows_netns:
            connections["key"]["netns"] = 0
        return connections

    def _tell_refused(self, refused: int) -> None:
        if not self._refused_is_told:
            log.warning(
                "there is no room for %s connections: raise --max-connections", refused
            )
        self._refused_is_told = True
