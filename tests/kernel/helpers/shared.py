# SPDX-License-Identifier: GPL-3.0-only
"""Exporters and trackers that several tests share, because starting them is slow."""

import contextlib
import ctypes
import itertools

import numpy as np

from tcpexporter.connections.parts import SECRET, SERIES_FIRST
from tcpexporter.connections.series import COUNTERS, SERIES_BYTES
from tcpexporter.ebpf import loader
from tcpexporter.ebpf.event_counters import EVENT_KINDS
from tcpexporter.ebpf.loader_protocol import MAX_SERIES, Request
from tcpexporter.ebpf.maps import FIRST
from tcpexporter.ebpf.ranges import SERIES_RANGE
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.socket_tables.tables import open_tables
from tests.kernel.helpers.in_process import SLOTS, attach, tracker_of
from tests.support import Exporter, inside, new_netns

# The arguments of exporters that are shared.
ALWAYS_LONG_TERM = ("--duration", "0")
AFTER_A_SECOND = ("--duration", "1")
EVERY_NAMESPACE = (*ALWAYS_LONG_TERM, "--netns", "all")
# Each outbound connection adds a series for its local port.
_MANY = (*ALWAYS_LONG_TERM, "--source", "ebpf", "--max-series", "65535")
BOTH_ENDS = (*_MANY, "--direction", "all")
OUTBOUND = (*_MANY, "--direction", "outbound", "--user", "daemon")

_ports = itertools.count(10103)


def unused_port() -> int:
    """Return a port that no other test uses, so that no shared exporter has a series for
    it.

    It is below the range of ephemeral ports.
    """
    return next(_ports)


class Exporters:
    """Exporters in one network namespace, one for each set of arguments.

    A test opens its own connections, ignores others, and closes them. All exporters run
    until the last test has ended, so none may use much CPU when idle. An exporter that
    ended or hangs is replaced, so that only one test fails.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, ...], Exporter] = {}

    def __call__(self, *arguments: str) -> Exporter:
        """Return the exporter with these arguments; the caller must be in its namespace."""
        running = self._running.pop(arguments, None)
        if running is not None and not running.is_ready():
            running.__exit__()
            running = None
        self._running[arguments] = running or Exporter(*arguments)
        return self._running[arguments]

    def close(self) -> None:
        """End all exporters; fail if one ends with an error or a traceback."""
        complaints = []
        for arguments, running in self._running.items():
            with running:
                code, log = running.stop()
            if code or "Traceback" in log:
                complaints.append(f"{' '.join(arguments)} ended with {code}:\n{log}")
        assert not complaints, "\n".join(complaints)


class SharedTracker:
    """A namespace with a loaded program, whose maps are cleared for each test."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self.netns = self._undo.enter_context(new_netns())
        with inside(self.netns):
            loaded = attach()
        self._undo.callback(loaded.close)
        self._descriptors = loaded._descriptors
        self._runs = loaded.runs

    def fresh(self) -> Tracker:
        """Return a tracker with empty maps, as after loading."""
        tracker = tracker_of(self._descriptors, Request(SLOTS, 0, SECRET), runs=self._runs)
        series = tracker.series
        tracker._closings._record(False)
        with tracker.runs.without_caches():
            tracker._handles.items(np.uint64, np.uint32, delete=True)
            series._numbers.items(SERIES_BYTES, np.uint32, delete=True)
            tracker.runs.wait()
        tracker._closings.pop()
        for free in (tracker._free_slots, series._free):
            while free.pop() is not None:
                pass
        loader._fill(self._descriptors.free_slots, range(SLOTS))
        used = SERIES_FIRST + MAX_SERIES
        ledger = series._ledger.upto(used)
        ledger[SERIES_FIRST:] = np.zeros(1, ledger.dtype)
        for name in COUNTERS:
            ledger[name] = 0
        corrections = series._corrections.upto(used)
        corrections[:] = np.zeros(1, corrections.dtype)
        numbers = range(SERIES_FIRST, SERIES_FIRST + MAX_SERIES)
        loader._fill(self._descriptors.free_series, numbers, SERIES_RANGE)
        counts = np.zeros((tracker._cpus, len(EVENT_KINDS)), np.uint64)
        zero_flags = ctypes.c_uint64(0)
        assert tracker._counters._call(
            "bpf_map_update_elem", np.array([FIRST]), counts, zero_flags
        )
        for slots in tracker._array.used():
            slots[:] = 0
        return tracker

    def is_quiet(self) -> bool:
        """Return whether no connection is established in its namespace."""
        with inside(self.netns):
            tables = open_tables("sock_diag", "self")
            with contextlib.closing(tables):
                return len(tables.established(with_ages=False)) == 0

    def close(self) -> None:
        self._undo.close()


class Trackers:
    """The shared tracker, which is replaced if a test fails or leaves a connection open."""

    def __init__(self) -> None:
        self._shared: SharedTracker | None = None

    @property
    def shared(self) -> SharedTracker:
        if self._shared is None:
            self._shared = SharedTracker()
        return self._shared

    def discard(self) -> None:
        """Close the shared tracker; the next test gets a new one."""
        if self._shared is not None:
            self._shared.close()
        self._shared = None
