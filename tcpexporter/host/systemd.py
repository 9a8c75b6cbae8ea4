# SPDX-License-Identifier: GPL-3.0-only
"""Reports the state of the exporter to systemd: sd_notify(3).

The exporter reads and removes systemd's environment variables before it starts any process.
It connects the socket before the process is confined; after that, the socket can send to
systemd only. A notification that cannot be sent is dropped. There is no reconnection:
systemd keeps its socket open as long as it runs, even when it re-executes itself.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Self

from tcpexporter.errors import reason

log = logging.getLogger(__name__)

STATUS_S = 60.0
"""Seconds between two status reports, if there is no watchdog."""


class Supervisor:
    """The connection to systemd, if systemd has started the exporter with Type=notify."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        """Connect.

        Args:
            address: the path of a socket, or its abstract name after an @; None: there is
                no socket, and nothing is reported.
            watchdog_s: systemd ends the exporter after this many seconds without a
                notification; None: there is no watchdog.
        """
        self._socket = _connect(address) if address else None
        self._watchdog_s = watchdog_s

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """Connect as systemd's environment variables say, and remove these variables."""
        address = environ.pop("NOTIFY_SOCKET", None)
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        process = environ.pop("WATCHDOG_PID", "")
        is_ours = process in ("", str(os.getpid()))
        is_time = re.fullmatch("[1-9][0-9]*", watchdog_us)
        return cls(address, int(watchdog_us) / 1e6 if is_ours and is_time else None)

    def fileno(self) -> int | None:
        """Return the descriptor of the socket; None: there is no socket."""
        return self._socket.fileno() if self._socket else None

    def tell(self, *assignments: str) -> None:
        """Send ``NAME=value`` lines as one message; it is dropped if that would block."""
        if self._socket:
            lines = (each.replace("\n", " ") for each in assignments)
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(lines).encode(errors="replace"))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Report to systemd that the configuration is reloaded during this block."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")
        try:
            yield
        finally:
            self.tell("READY=1")

    async def keep(
        self, check: Callable[[], Awaitable[str | None]], status: Callable[[], str]
    ) -> None:
        """Report the state twice per watchdog interval, until cancelled.

        While the check fails, the state is reported eight times per watchdog interval.
        Without a watchdog, it is reported every `STATUS_S` seconds.

        Args:
            check: a function that returns what does not work; None: everything works. The
                watchdog is notified only if everything works.
            status: a function that returns the text to report when everything works.
        """
        if self._socket is None:
            return
        watchdog_s = self._watchdog_s
        while True:
            try:
                trouble = await check()
            except Exception as error:
                trouble = reason(error)
            works = trouble is None
            feed = ("WATCHDOG=1",) if works and watchdog_s else ()
            self.tell(f"STATUS={trouble or status()}", *feed)
            # More often while the check fails: systemd must be notified soon after that.
            part = 2 if works else 8
            # The event loop has imported it; before that, it would delay the start.
            from asyncio import sleep  # noqa: PLC0415

            await sleep(watchdog_s / part if watchdog_s else STATUS_S)


def _connect(address: str) -> socket.socket | None:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    # A notification must never block the exporter.
    connected.setblocking(False)
    try:
        connected.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        log.warning(
            "cannot send notifications to systemd at %s: %s", address, error.strerror
        )
        connected.close()
        return None
    return connected
