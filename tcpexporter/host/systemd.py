# SPDX-License-Identifier: GPL-3.0-only
"""Tells systemd how the exporter is doing: sd_notify(3).

What systemd has in the environment is read and removed before anything is started, and the
socket is connected before the process is confined: then it can send there, and to nobody
else. One that cannot be reached any more is not told; systemd keeps its own for as long as
it runs, even when it executes itself anew.
"""

import asyncio
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
"""Between two looks at how it is doing, where there is no watchdog."""


class Supervisor:
    """systemd, if it has started the exporter and wants to know."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        """Connect.

        Args:
            address: Path of a socket, or its abstract name after an @; None: nobody wants
                to know.
            watchdog_s: If there is no sign of life for so long, the exporter is ended;
                None: it is not.
        """
        self._socket = _connect(address) if address else None
        self._watchdog_s = watchdog_s

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """That of an environment, which has nothing about it afterwards."""
        address = environ.pop("NOTIFY_SOCKET", None)
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        process = environ.pop("WATCHDOG_PID", "")
        is_ours = process in ("", str(os.getpid()))
        is_time = re.fullmatch("[1-9][0-9]*", watchdog_us)
        return cls(address, int(watchdog_us) / 1e6 if is_ours and is_time else None)

    def fileno(self) -> int | None:
        """The descriptor of its socket, if it has one."""
        return self._socket.fileno() if self._socket else None

    def tell(self, *assignments: str) -> None:
        """Send ``NAME=value`` lines as one message, which is lost if nobody takes it."""
        if self._socket:
            lines = (each.replace("\n", " ") for each in assignments)
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(lines).encode(errors="replace"))

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Have it know that this block reads the configuration again."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")
        try:
            yield
        finally:
            self.tell("READY=1")

    async def keep(
        self, check: Callable[[], Awaitable[str | None]], status: Callable[[], str]
    ) -> None:
        """Tell, for ever, what is checked every half of what the watchdog takes.

        In trouble it is checked every eighth.

        Args:
            check: Says what does not work; None: all does, which feeds the watchdog.
            status: What to say then.
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
            # In trouble sooner: what is over by then is no reason to be ended.
            part = 2 if works else 8
            await asyncio.sleep(watchdog_s / part if watchdog_s else STATUS_S)


def _connect(address: str) -> socket.socket | None:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    # Whoever does not take it is not waited for.
    connected.setblocking(False)
    try:
        connected.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as error:
        log.warning("systemd is not told anything at %s: %s", address, error.strerror)
        connected.close()
        return None
    return connected
