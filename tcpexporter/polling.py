# SPDX-License-Identifier: GPL-3.0-only
"""A source that polls the socket tables, for hosts without BPF."""

import logging
import threading
from collections.abc import Iterator

import numpy as np

from tcpexporter.connections import CONNECTION, Records
from tcpexporter.errors import SourceError, enough_memory
from tcpexporter.siphash import hashes
from tcpexporter.sockets import SocketTables
from tcpexporter.sources import Report

log = logging.getLogger(__name__)


class PollingSource:
    """The connections of the last poll, their age counted from the first that saw them."""

    def __init__(self, tables: SocketTables, interval_s: float) -> None:
        self.name = tables.name
        self._tables = tables
        self._interval_s = interval_s
        self._last: Records | SourceError = np.empty(0, CONNECTION)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll_on, name="poll", daemon=True)

    def start(self) -> None:
        """Poll once, then go on in a thread.

        Raises:
            SourceError: the first poll fails.
        """
        self._last = self._tables.established()
        self._thread.start()

    def close(self) -> None:
        """End the thread and close the tables."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._tables.close()

    def read(self) -> Iterator[Records]:
        if isinstance(self._last, SourceError):
            raise self._last
        yield self._last

    def listeners(self) -> Records:
        return self._tables.listeners()

    def report(self) -> Report:
        return Report()

    def _poll_on(self) -> None:
        known = next(self.read())
        while not self._stop.wait(self._interval_s):
            try:
                with enough_memory():
                    known = self._last = first_seen(
                        self._tables.established(with_ages=False), known
                    )
            except SourceError as error:
                if not isinstance(self._last, SourceError):
                    log.warning("no connections can be counted: %s", error)
                self._last = error


def first_seen(now: Records, before: Records) -> Records:
    """``now`` with what ``before`` knew of the same connections; both dtype `CONNECTION`.

    The direction is kept as well: a service that stops listening keeps its
    connections, and they stay inbound.
    """
    wanted, there = hashes(now["key"]), hashes(before["key"])
    order = np.argsort(there)
    place = np.searchsorted(there, wanted, sorter=order)
    place = order[np.minimum(place, len(order) - 1)] if len(order) else place
    known = np.flatnonzero(np.isin(wanted, there))
    for field in ("established_ns", "group"):
        now[field][known] = before[field][place[known]]
    return now
