# SPDX-License-Identifier: GPL-3.0-only
"""Starts the source of connections in a thread, while HTTP already answers 503."""

import os
import signal
import threading
from collections.abc import Callable

from tcpexporter.errors import SourceError
from tcpexporter.host import background, namespaces


class Starting:
    """The start of a source in a thread, which reads the pre-existing connections."""

    def __init__(
        self, start: Callable[[], None], watch: namespaces.Watch | None = None
    ) -> None:
        """Prepare; `begin` starts the thread.

        Args:
            start: a function that starts the source, or raises the error that prevents it.
            watch: detects that the counted namespace was replaced; None: it cannot be
                replaced.
        """
        self._start = start
        self._watch = watch
        self._awaited: str | None = "the pre-existing connections are being read"
        self._failure: Exception | None = None

    def begin(self, then: Callable[[], None]) -> None:
        """Start the source in a thread, which calls ``then`` after a successful start.

        If the start fails, the process gets SIGTERM, and `raise_failure` raises the error.

        Raises:
            ThreadError: the kernel refuses another thread.
        """
        background.start(
            threading.Thread(target=self._run, args=(then,), name="start", daemon=True)
        )

    def awaited(self) -> str | None:
        """Return why there are no metrics now; None: there are metrics.

        If the name of --netns now refers to another namespace, this ends the exporter with
        an error: a confined process cannot enter that namespace.
        """
        if self._awaited or not self._watch:
            return self._awaited
        trouble = self._watch.trouble()
        if self._watch.is_replaced and not self._failure:
            self._fail(SourceError(trouble))
        return trouble

    def raise_failure(self) -> None:
        """Raise the error that prevented the start or ended the exporter, if any."""
        if self._failure:
            raise self._failure

    def _run(self, then: Callable[[], None]) -> None:
        try:
            self._start()
            self._awaited = None
            then()
        except Exception as error:
            self._fail(error)

    def _fail(self, failure: Exception) -> None:
        self._failure = failure
        os.kill(os.getpid(), signal.SIGTERM)
