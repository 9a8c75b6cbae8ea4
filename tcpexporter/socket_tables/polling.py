# SPDX-License-Identifier: GPL-3.0-only
"""Implements the sources that poll the socket tables, for hosts without BPF."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.identity import hashes, is_first
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import Parts
from tcpexporter.connections.record import SOCKET, Records, Words
from tcpexporter.connections.series import Ledger
from tcpexporter.connections.sets import is_in
from tcpexporter.connections.snapshot import first_seen
from tcpexporter.connections.source import Report
from tcpexporter.errors import SourceError
from tcpexporter.host.background import Task
from tcpexporter.socket_tables.tables import SocketTables

if TYPE_CHECKING:  # imported only with --state, to save memory
    from tcpexporter.socket_tables.saved_ages import State

LIMIT_S = 60.0
"""Seconds after which a poll counts as hanging: its result would be too old."""

STOP_TIMEOUT_S = 5.0
"""Seconds that `close` waits for the last poll."""


class PollingSource:
    """The connections of the last poll, with the times of the polls that found them."""

    def __init__(
        self,
        tables: SocketTables,
        interval_s: float,
        state: "State | None" = None,
        *,
        parts: Parts,
        lifetime_bounds_s: Sequence[float] = (),
    ) -> None:
        """Prepare to poll; `start` starts polling.

        Args:
            tables: the socket tables, which `close` closes.
            interval_s: time between two polls.
            state: where ages are restored from and saved to; None: nowhere.
            parts: what is counted separately.
            lifetime_bounds_s: as for `MemoryLedger`.
        """
        self.name = tables.name
        self._tables = tables
        self._state = state
        self._interval_s = interval_s
        self._last: Records = np.empty(0, SOCKET)
        self._counted = MemoryLedger(parts, lifetime_bounds_s)
        self._chunk = self._counted.count(self._last)
        self._records_and_words = self._last, self._chunk.words
        self._ledger = self._counted.snapshot()
        self._task = Task(
            "poll",
            self._poll_repeatedly,
            without="cannot count connections",
            limit_s=LIMIT_S,
        )

    def tasks(self) -> list[Task]:
        return [self._task, *(self._state.tasks() if self._state else ())]

    def start(self) -> None:
        """Poll once, then start a thread that polls at intervals.

        Raises:
            SourceError: the first poll fails.
            ThreadError: the kernel refuses another thread.
        """
        tables = self._state.aged(self._tables) if self._state else self._tables
        self._last = _distinct(tables.established(with_ages=True))
        self._chunk = self._counted.count(self._last)
        self._counted.record_pre_existing(self._chunk.words)
        self._records_and_words = self._last, self._chunk.words
        self._ledger = self._counted.snapshot()
        self._task.begin()
        if self._state:
            self._state.begin(lambda: self._last)

    def close(self) -> None:
        """End the thread, and close the tables unless a poll hangs."""
        if self._task.stop(STOP_TIMEOUT_S):
            self._tables.close()

    def read(self) -> Iterator[Chunk]:
        if trouble := self._task.trouble():
            raise SourceError(trouble)
        yield self._chunk

    def records(self) -> Iterator[tuple[Records, Words]]:
        yield self._records_and_words

    def ledger(self) -> Ledger:
        return self._ledger

    def forget(self, field: str, values: Iterable[int]) -> None:
        self._counted.forget(field, values)

    def listeners(self) -> Records:
        return self._tables.listeners()

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def report(self) -> Report:
        return Report(state_saved_s=self._state.saved_s if self._state else None)

    def _poll_repeatedly(self) -> None:
        while not self._task.wait(self._interval_s):
            with self._task.attempt():
                self._poll()

    def _poll(self) -> None:
        """Read the connections, and record what has changed since the last poll.

        A connection that opens and closes between two polls is not seen. One that closes
        and opens again between them looks as if it had stayed open.

        If a poll fails, the next one compares with the same connections again. So a failed
        poll must change nothing.
        """
        now_ns = boottime_ns()
        shown = _distinct(self._tables.established(with_ages=False))
        now = first_seen(shown, [self._last])
        found, before = hashes(now["key"]), hashes(self._last["key"])
        is_open = is_in(before, found)
        is_new = ~is_in(found, before)
        with self._counted.unchanged_on_failure():
            self._counted.record_closed(self._chunk.words[~is_open], now_ns)
            self._counted.drop_forgotten(self._chunk.words[is_open])
            chunk = self._counted.count(now)
            self._counted.record_opened(chunk.words[is_new])
            ledger = self._counted.snapshot()
            records_and_words = now, chunk.words
        # In this order: the ledger has every series that `read` has returned.
        self._ledger, self._chunk = ledger, chunk
        self._records_and_words = records_and_words
        self._last = now


def _distinct(shown: Records) -> Records:
    """Return each connection once: a dump can repeat one that stays open."""
    is_new = is_first(hashes(shown["key"]))
    return shown if is_new.all() else shown[is_new]
