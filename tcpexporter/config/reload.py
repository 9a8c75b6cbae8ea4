# SPDX-License-Identifier: GPL-3.0-only
"""What is read again, when its file changes or SIGHUP comes, and what came of it."""

import contextlib
import logging
import os
import select
import signal
from collections.abc import Callable, Collection, Mapping
from types import FrameType

from tcpexporter.config.reader import ANSWERED, Reader, ReaderGoneError, Told
from tcpexporter.errors import SettingsError, SourceError, enough_memory
from tcpexporter.host.background import RETRY_S, Task
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.reload_status import Reloads

log = logging.getLogger(__name__)

BEAT_S = 60.0
"""Between two signs that the thread still waits for something to do."""

LIMIT_S = 300.0
"""For reading everything again."""

Take = Callable[[Told], None]
"""Puts into force what is told; raises SettingsError when it cannot be."""


class Hangups:
    """SIGHUPs, which are kept until they are taken; many at once are one."""

    def __init__(self) -> None:
        # A pipe, as a handler may interrupt itself: it may not wait for a lock.
        self._ours, self._handlers = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def catch(self) -> None:
        """Keep them from now on; in the main thread."""
        signal.signal(signal.SIGHUP, self.keep)

    def fileno(self) -> int:
        """Can be read from when there are any."""
        return self._ours

    def take(self) -> None:
        """Have none left."""
        os.read(self._ours, select.PIPE_BUF)

    def keep(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Handle one."""
        with contextlib.suppress(BlockingIOError):  # there are enough
            os.write(self._handlers, b"\0")


class Reloading:
    """Follows the files, and SIGHUP, in a thread."""

    def __init__(
        self,
        reader: Reader | None,
        hangups: Hangups,
        supervisor: Supervisor,
        reloads: Reloads,
    ) -> None:
        """Prepare; `follow` begins.

        Args:
            reader: Has what there is to know; None: there is no file.
            hangups: When to ask it.
            supervisor: Is told of that.
            reloads: Where what came of it is noted.
        """
        self._reader = reader
        self._why_not = "neither --conf nor --web-config names a file"
        self._takers: Mapping[str, Take] = {}
        self._hangups = hangups
        self._supervisor = supervisor
        self._reloads = reloads
        self._closed = False
        self.task = Task(
            "reload", self._follow, without="no file can be read again", limit_s=LIMIT_S
        )

    def follow(self, takers: Mapping[str, Take]) -> None:
        """From now on take over what changes.

        Args:
            takers: Who takes over what the reader tells, by what that is about.

        Raises:
            ThreadError: there can be no thread.
        """
        self._takers = takers
        self.task.begin()

    def close(self) -> None:
        """Say nothing of the reader's end: it is meant."""
        self._closed = True
        self.task.stop(0)

    def _follow(self) -> None:
        waiting = select.poll()
        waiting.register(self._hangups, select.POLLIN)
        if self._reader:
            waiting.register(self._reader, select.POLLIN)
        while True:
            self.task.beat(BEAT_S)
            ready = {descriptor for descriptor, _ in waiting.poll(1000 * BEAT_S)}
            self.task.beat()
            with self.task.attempt():
                try:
                    self._act(ready)
                except ReaderGoneError:
                    if self._closed:
                        return
                    waiting.unregister(self._reader)  # type: ignore[arg-type]
                    self._do_without()
            if self.task.is_failing and not self.task.wait(RETRY_S) and self._reader:
                self._hangups.keep()  # what was to be read has not been

    def _act(self, ready: Collection[int]) -> None:
        """Do what these descriptors are ready for."""
        if self._hangups.fileno() in ready:
            self._hangups.take()
            with self._supervisor.reloading():
                self._read_again()
        elif ready and self._reader:
            self._take_next(self._reader)

    def _read_again(self) -> None:
        if self._reader is None:
            log.info("SIGHUP: there is nothing to read again, as %s", self._why_not)
            return
        self._reader.ask()
        while self._take_next(self._reader) != ANSWERED:
            pass

    def _take_next(self, reader: Reader) -> str:
        told = reader.receive()
        if take := self._takers.get(told.about):
            try:
                with enough_memory():
                    take(told)
            except (SettingsError, SourceError) as error:
                log.warning("going on with the %s as before: %s", told.about, error)
                self._reloads.record(told.about, successful=False)
            else:
                self._reloads.record(told.about, successful=True)
        return told.about

    def _do_without(self) -> None:
        self._reader = None
        self._why_not = "the reader has ended: restart to have another"
        self._reloads.record("reader", successful=False)
        log.warning("no file will be read again, as %s", self._why_not)
