# SPDX-License-Identifier: GPL-3.0-only
"""What is read again, when its file changes or SIGHUP comes, and what came of it."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType

from tcpexporter.errors import SettingsError, SourceError, enough_memory
from tcpexporter.reader import ANSWERED, Reader, ReaderGoneError, Told
from tcpexporter.supervisor import Supervisor

log = logging.getLogger(__name__)

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

    def keep(self, _number: int, _frame: FrameType | None) -> None:
        """Handle one."""
        with contextlib.suppress(BlockingIOError):  # there are enough
            os.write(self._handlers, b"\0")


class Reloads:
    """What came of reading, the first time and again."""

    def __init__(self) -> None:
        """Begin with what was read at the start, which is in force."""
        self.succeeded_s = time.time()
        """When all that was read was in force last, by the wall clock."""
        self._failed: set[str] = set()

    @property
    def successful(self) -> bool:
        """Whether all that was read last is in force."""
        return not self._failed

    def note(self, about: str, *, successful: bool) -> None:
        """What came of one of the files."""
        if successful:
            self._failed.discard(about)
        else:
            self._failed.add(about)
        if not self._failed:
            self.succeeded_s = time.time()


class Reloading:
    """Follows the files, and SIGHUP, in a thread."""

    def __init__(
        self,
        reader: Reader | None,
        takers: Mapping[str, Take],
        hangups: Hangups,
        supervisor: Supervisor,
        reloads: Reloads,
    ) -> None:
        """Prepare; `follow` begins.

        Args:
            reader: Has what there is to know; None: there is no file.
            takers: Who takes over what it tells, by what that is about.
            hangups: When to ask it.
            supervisor: Is told of that.
            reloads: Where what came of it is noted.
        """
        self._reader = reader
        self._why_not = "neither --conf nor --web-config names a file"
        self._takers = takers
        self._hangups = hangups
        self._supervisor = supervisor
        self._reloads = reloads
        self._closed = False

    def follow(self) -> None:
        """From now on take over what changes."""
        threading.Thread(target=self._follow, name="reload", daemon=True).start()

    def close(self) -> None:
        """Say nothing of the reader's end: it is meant."""
        self._closed = True

    def _follow(self) -> None:
        waiting = select.poll()
        waiting.register(self._hangups, select.POLLIN)
        if self._reader:
            waiting.register(self._reader, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll()}
            try:
                if self._hangups.fileno() in ready:
                    self._hangups.take()
                    with self._supervisor.reloading():
                        self._read_again()
                elif self._reader:
                    self._take_next(self._reader)
            except ReaderGoneError:
                if self._closed:
                    return
                waiting.unregister(self._reader)  # type: ignore[arg-type]
                self._do_without()

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
                self._reloads.note(told.about, successful=False)
            else:
                self._reloads.note(told.about, successful=True)
        return told.about

    def _do_without(self) -> None:
        self._reader = None
        self._why_not = "the reader has ended: restart to have another"
        self._reloads.note("reader", successful=False)
        log.warning("no file will be read again, as %s", self._why_not)
