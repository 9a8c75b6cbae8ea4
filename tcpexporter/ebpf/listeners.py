# SPDX-License-Identifier: GPL-3.0-only
"""Dumps the listening ports again after a listener has changed, or after a minute.

The BPF program counts the listeners that appear and disappear. The kernel reports a new
listener before a dump shows it (inet_csk_listen_start in its
net/ipv4/inet_connection_sock.c). So a dump may be used for later scrapes only if it began
at least `SETTLED_S` after the last change. These are the cases for a listener:

a. It appears or disappears before a dump that is used for later scrapes: the dump is
   correct.
b. It appears or disappears after that dump: the count changes, so the next scrape reads
   the listeners again.
c. The kernel reports it, and then preempts the process that calls listen(2): a dump shows
   the listener more than `SETTLED_S` after the report. Or the kernel skips the program. In
   both cases a scrape shows it at most `REFRESH_S` later. Until then, only a series without
   connections can be missing.
"""

import math
import threading
import time
from collections.abc import Callable

from tcpexporter.connections.record import Records

SETTLED_S = 1.0
"""Seconds after the report of a change until a dump certainly shows it, except in c."""

REFRESH_S = 60.0
"""Maximum age of a dump that is used, in seconds."""


class Listeners:
    """The listening ports."""

    def __init__(
        self,
        dump: Callable[[], Records],
        changes: Callable[[], int],
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read nothing yet.

        Args:
            dump: reads the listening ports, of dtype `LISTENER`.
            changes: returns how many listeners have appeared or disappeared.
            clock_s: returns the time, in seconds.
        """
        self._dump = dump
        self._count_changes = changes
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._changes = -1
        self._changed_s = self._dumped_s = -math.inf
        self._listeners: Records | None = None

    def read(self) -> Records:
        """Return the listening ports, of dtype `LISTENER`; any thread may call this.

        The array is that of the previous call, if nothing has changed.

        Raises:
            SourceError: the listening ports or the count of changes cannot be read.
        """
        with self._lock:
            changes = self._count_changes()
            now_s = self._clock_s()  # not before the report of the last counted change
            if changes != self._changes:
                self._changes, self._changed_s = changes, now_s
            is_settled = self._dumped_s - self._changed_s >= SETTLED_S
            if (
                self._listeners is None
                or not is_settled
                or now_s - self._dumped_s >= REFRESH_S
            ):
                self._listeners = self._dump()
                self._dumped_s = now_s
            return self._listeners
