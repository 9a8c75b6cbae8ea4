# SPDX-License-Identifier: GPL-3.0-only
"""Background threads that neither end nor hang unnoticed.

A `Task` is a thread that runs a loop. Whatever the loop raises is logged once, counted, and
tried again. A loop that has not come round in time hangs. What else depends on a task asks
for its `Task.trouble`: a source that it keeps up to date gives no numbers, and systemd's
watchdog is not fed.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from tcpexporter.errors import ThreadError, reason

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Until work that has failed is tried again, unless its interval is shorter."""


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ThreadError: the kernel refuses another one.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadError(reason(error)) from error


class Task:
    """A thread that does the same work again and again."""

    def __init__(
        self, name: str, loop: Callable[[], None], *, without: str, limit_s: float
    ) -> None:
        """Prepare; `begin` starts the thread.

        Args:
            name: Of the thread, and the value of the metric's label.
            loop: Calls `wait` between two rounds until that returns True. It reports each
                round by `attempt`, or by `works` and `failed`.
            without: What the log says when a round fails, before the reason.
            limit_s: A round that takes longer than this hangs.
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
        """When it must have come round, on the monotonic clock."""
        self._hang_is_told = False

    def begin(self) -> None:
        """Start the thread.

        Raises:
            ThreadError: the kernel refuses another one.
        """
        start(self._thread)
        self.beat()

    def stop(self, timeout_s: float) -> bool:
        """Have the loop end; returns whether the thread has ended in that time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # For the loop

    def wait(self, interval_s: float) -> bool:
        """Rest until the next round; returns whether the loop has to end.

        The rest is shorter than ``interval_s`` if that is long and the last round failed.
        """
        rest_s = min(interval_s, RETRY_S) if self._failure else interval_s
        self.beat(rest_s)
        is_over = self._stop.wait(rest_s)
        self.beat()
        return is_over

    def beat(self, rest_s: float = 0) -> None:
        """Show that the loop goes on, and may do nothing for ``rest_s`` seconds now."""
        self._failures += self._overdue_rounds()
        self._due_s = time.monotonic() + rest_s + self._limit_s
        if self._hang_is_told:
            self._hang_is_told = False
            log.info("%s: the thread goes on", self.name)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """A round: it works unless the block raises, which ends here."""
        try:
            yield
        except Exception as error:
            self.failed(error)
        else:
            self.works()

    def works(self) -> None:
        """A round did all that it has to do."""
        if self._failure:
            log.info("%s: it works again", self.name)
        self._failure = None

    def failed(self, error: BaseException) -> None:
        """A round did not; it is logged if the one before did."""
        self._failures += 1
        if not self._failure:
            log.warning("%s: %s", self._without, reason(error))
            log.debug("%s: the thread has failed", self.name, exc_info=error)
        self._failure = reason(error)

    # For those who depend on it

    @property
    def is_failing(self) -> bool:
        """Whether the last round that ended has failed."""
        return self._failure is not None

    def trouble(self) -> str | None:
        """Why its work is not done now, in a sentence; None: it is, or has not begun."""
        if self._due_s == math.inf:
            return None
        if not (self._thread.is_alive() or self._stop.is_set()):
            return f"{self._without}: the thread has ended: restart the exporter"
        if self._overdue_rounds():
            sentence = f"the thread {self.name} hangs: it has done nothing in time"
            if not self._hang_is_told:
                self._hang_is_told = True
                log.warning("%s: %s", self._without, sentence)
            return sentence
        return self._failure

    def failures(self) -> int:
        """How many rounds have failed; while it hangs, one more each ``limit_s``."""
        self.trouble()
        return self._failures + self._overdue_rounds()

    def _overdue_rounds(self) -> int:
        overdue_s = time.monotonic() - self._due_s
        return 1 + int(overdue_s / self._limit_s) if overdue_s > 0 else 0

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._loop()
                break
            except BaseException as error:
                self.failed(error)
                self.wait(RETRY_S)


def trouble(tasks: Iterable[Task]) -> str | None:
    """Of the first of these that has any; None: all work."""
    return next(filter(None, (each.trouble() for each in tasks)), None)
