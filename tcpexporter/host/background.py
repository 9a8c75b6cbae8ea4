# SPDX-License-Identifier: GPL-3.0-only
"""Runs background threads, and detects threads that fail or hang.

A `Task` is a thread that runs a loop. An error in the loop is logged once and counted, and
the loop is tried again. A round of the loop that exceeds its time limit counts as hanging.
Code that depends on a task calls `Task.trouble`. A source whose numbers would be wrong then
raises an error. While any task has trouble, systemd's watchdog is not notified.
"""

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from tcpexporter.errors import ThreadError, reason

log = logging.getLogger(__name__)

_T = TypeVar("_T")

RETRY_S = 5.0
"""Seconds until a failed round is tried again, unless its interval is shorter."""


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ThreadError: the kernel refuses another thread.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(reason(error)) from error


def ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Yield the items; a thread gets the next one while the caller uses this one.

    At the end, and when the result is closed, no such thread runs and the generator is
    closed. If the generator fails, its error is raised after the items before it.

    Raises:
        ThreadError: the kernel refuses another thread.
    """
    with contextlib.closing(items):
        following = _next_of(items)
        try:
            while item := following.result():
                following = _next_of(items)
                yield from item
        finally:
            wait([following])


def _next_of(items: Iterator[_T]) -> "Future[tuple[_T, ...]]":
    """Start a thread that gets the next item; the result is empty if there is none."""
    return in_thread("ahead", lambda: tuple(itertools.islice(items, 1)))


def in_thread(name: str, work: Callable[[], _T]) -> "Future[_T]":
    """Start a thread that calls a function; return a future of its result or error.

    Raises:
        ThreadError: the kernel refuses another thread.
    """
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    start(threading.Thread(target=run, name=name, daemon=True))
    return outcome


class Task:
    """A thread that does the same work repeatedly; each repetition is a round."""

    def __init__(
        self, name: str, loop: Callable[[], None], *, without: str, limit_s: float
    ) -> None:
        """Prepare; `begin` starts the thread.

        Args:
            name: the name of the thread, and the value of the label ``task``.
            loop: the function of the thread. It calls `wait` between two rounds, and ends
                when `wait` returns True. It reports the result of each round by `attempt`,
                or by `works` and `failed`.
            without: the effect of a failed round, such as "ages are not saved"; the log has
                it before the reason.
            limit_s: a round that takes longer counts as hanging, in seconds.
        """
        self.name = name
        self._loop = loop
        self._without = without
        self._limit_s = limit_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._failures = 0
        self._failure: str | None = None
        self._due_s = math.inf
        """When the current round must end, in seconds on the monotonic clock."""
        self._hang_is_logged = False

    def begin(self) -> None:
        """Start the thread.

        Raises:
            ThreadError: the kernel refuses another thread.
        """
        start(self._thread)

    def stop(self, timeout_s: float) -> bool:
        """Make the loop end; return whether the thread has ended within ``timeout_s``."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Methods for the loop

    def wait(self, interval_s: float) -> bool:
        """Wait until the next round; return whether the loop must end.

        After a failed round, it waits at most `RETRY_S` seconds.
        """
        rest_s = min(interval_s, RETRY_S) if self._failure else interval_s
        self.beat(rest_s)
        is_over = self._stop.wait(rest_s)
        self.beat()
        return is_over

    def beat(self, rest_s: float = 0) -> None:
        """Report that the thread works, and will now wait for ``rest_s`` seconds."""
        self._failures += self._overdue_rounds()
        self._due_s = time.monotonic() + rest_s + self._limit_s
        if self._hang_is_logged:
            self._hang_is_logged = False
            log.info("%s: the thread no longer hangs", self.name)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run the block as a round, which fails if the block raises an error."""
        try:
            yield
        except Exception as error:
            self.failed(error)
        else:
            self.works()

    def works(self) -> None:
        """Report that a round has succeeded."""
        if self._failure:
            log.info("%s: the thread works again", self.name)
        self._failure = None

    def failed(self, error: BaseException) -> None:
        """Report that a round has failed; log that if the previous round succeeded."""
        self._failures += 1
        if not self._failure:
            log.warning("%s: %s", self._without, reason(error))
            log.debug("%s: the thread has failed", self.name, exc_info=error)
        self._failure = reason(error)

    # Methods for code that depends on the task

    @property
    def is_failing(self) -> bool:
        """Whether the last finished round has failed."""
        return self._failure is not None

    def trouble(self) -> str | None:
        """Return why the thread fails or hangs; None: it works, or has not been started."""
        if self._due_s == math.inf:
            return None
        if not (self._thread.is_alive() or self._stop.is_set()):
            return f"{self._without}: the thread has ended: restart the exporter"
        if self._overdue_rounds():
            sentence = f"the thread {self.name} hangs: it has exceeded its time limit"
            if not self._hang_is_logged:
                self._hang_is_logged = True
                log.warning("%s: %s", self._without, sentence)
            return sentence
        return self._failure

    def failures(self) -> int:
        """Return how many rounds have failed; a hang counts once per ``limit_s``."""
        self.trouble()
        return self._failures + self._overdue_rounds()

    def _overdue_rounds(self) -> int:
        overdue_s = time.monotonic() - self._due_s
        return 1 + int(overdue_s / self._limit_s) if overdue_s > 0 else 0

    def _run(self) -> None:
        # Only this thread calls `beat`. After `start`, `begin` could replace the time limit
        # of a thread that already waits.
        self.beat()
        while not self._stop.is_set():
            try:
                self._loop()
                break
            except BaseException as error:
                self.failed(error)
                self.wait(RETRY_S)


def trouble(tasks: Iterable[Task]) -> str | None:
    """Return the trouble of the first task that has trouble; None: all tasks work."""
    return next(filter(None, (each.trouble() for each in tasks)), None)
