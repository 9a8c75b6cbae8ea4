# SPDX-License-Identifier: GPL-3.0-only
"""Reads and applies configuration files again when they change or SIGHUP arrives."""

import contextlib
import logging
import os
import select
import signal
from collections.abc import Callable, Collection, Mapping
from types import FrameType

from tcpexporter.config.reader import ANSWERED, Message, Reader, ReaderGoneError
from tcpexporter.errors import SettingsError, SourceError, enough_memory
from tcpexporter.host.background import RETRY_S, Task
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.reload_status import Reloads

log = logging.getLogger(__name__)

BEAT_S = 60.0
"""Seconds after which a waiting thread reports that it does not hang."""

LIMIT_S = 300.0
"""Seconds for reading and applying all files; after that the thread counts as hanging."""

Apply = Callable[[Message], None]
"""Applies a message of the reader; raises SettingsError if its content cannot be used."""


class ReloadSignal:
    """Remembers that SIGHUP has arrived, until it is cleared."""

    def __init__(self) -> None:
        # A pipe instead of a lock: a signal handler can interrupt itself, and must not
        # wait.
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def catch(self) -> None:
        """Handle SIGHUP from now on; call this in the main thread."""
        signal.signal(signal.SIGHUP, self.raise_again)

    def fileno(self) -> int:
        """Return a descriptor that is readable after the signal has arrived."""
        return self._read_end

    def clear(self) -> None:
        """Forget the signals that have arrived."""
        os.read(self._read_end, select.PIPE_BUF)

    def raise_again(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Remember that a signal has arrived."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of earlier signals
            os.write(self._write_end, b"\0")


class Reloading:
    """Waits in a thread for changed files and SIGHUP, and applies the files."""

    def __init__(
        self,
        reader: Reader | None,
        signal_: ReloadSignal,
        supervisor: Supervisor,
        reloads: Reloads,
    ) -> None:
        """Prepare; `follow` starts the thread.

        Args:
            reader: the process that reads the files; None: there is no file.
            signal_: the signal that asks for all files to be read again.
            supervisor: systemd, which is notified of each reload.
            reloads: the record of the results.
        """
        self._reader = reader
        self._why_not = "neither --conf nor --web-config names a file"
        self._appliers: Mapping[str, Apply] = {}
        self._signal = signal_
        self._supervisor = supervisor
        self._reloads = reloads
        self._closed = False
        self.task = Task(
            "reload",
            self._follow,
            without="changes of configuration files are ignored",
            limit_s=LIMIT_S,
        )

    def follow(self, appliers: Mapping[str, Apply]) -> None:
        """Apply changes from now on.

        Args:
            appliers: the function that applies a message, for each subject of messages.

        Raises:
            ThreadError: the kernel refuses another thread.
        """
        self._appliers = appliers
        self.task.begin()

    def close(self) -> None:
        """Stop the thread; do not log the end of the reader from now on."""
        self._closed = True
        self.task.stop(0)

    def _follow(self) -> None:
        waiting = select.poll()
        waiting.register(self._signal, select.POLLIN)
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
                    self._report_end_of_reader()
            if self.task.is_failing and not self.task.wait(RETRY_S) and self._reader:
                self._signal.raise_again()  # the files have not been applied yet

    def _act(self, ready: Collection[int]) -> None:
        """Handle these readable descriptors."""
        if self._signal.fileno() in ready:
            self._signal.clear()
            with self._supervisor.reloading():
                self._read_again()
        elif ready and self._reader:
            self._apply_next(self._reader)

    def _read_again(self) -> None:
        if self._reader is None:
            log.warning("SIGHUP has no effect: %s", self._why_not)
            return
        self._reader.ask()
        while self._apply_next(self._reader) != ANSWERED:
            pass

    def _apply_next(self, reader: Reader) -> str:
        """Apply the next message, and return its subject."""
        message = reader.receive()
        if apply := self._appliers.get(message.about):
            try:
                with enough_memory():
                    apply(message)
            except (SettingsError, SourceError) as error:
                log.warning(
                    "reload of %s failed; the previous one stays in force: %s",
                    message.about,
                    error,
                )
                self._reloads.record(message.about, successful=False)
            else:
                self._reloads.record(message.about, successful=True)
        return message.about

    def _report_end_of_reader(self) -> None:
        self._reader = None
        self._why_not = "the process that reads files has ended: restart the exporter"
        self._reloads.record("reader", successful=False)
        log.warning("configuration files are not read again: %s", self._why_not)
