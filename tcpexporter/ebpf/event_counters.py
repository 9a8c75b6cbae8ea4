# SPDX-License-Identifier: GPL-3.0-only
"""Reads what the BPF program and the kernel have counted since the program was loaded."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.maps import FIRST, Map, map_errors, possible_cpus, program_info

RECURSION_MISSES_BYTES = 208
"""Offset of ``recursion_misses`` in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""


class Events(NamedTuple):
    """What a program has done since it was loaded, on all CPUs.

    All fields but the last are those of ``struct tracker_events``.
    """

    inserted: int
    """Connections that it has recorded."""
    removed: int
    """Connections that it has removed."""
    refused: int
    """Connections that it could not record for lack of a free slot."""
    removed_seeds: int
    """Those of the removed connections that were seeds."""
    allocated: int
    """Slots that it has allocated."""
    unrecorded: int
    """Closings that it did not record, because the closings log was full."""
    listener_changes: int
    """Listeners that have appeared or disappeared."""
    missed: int
    """As `EventCounters.missed_events` returns it."""


EVENT_KINDS = Events._fields[:-1]
"""The fields of ``struct tracker_events``, in their order."""


class EventCounters:
    """The counters of a loaded program; any thread may read them."""

    def __init__(self, descriptors: Descriptors) -> None:
        """Use the descriptors of a program and its maps, which must stay open."""
        self._program = descriptors.program
        self._counters = Map(descriptors.events, "events")
        self._cpus = possible_cpus()

    @map_errors()
    def events(self) -> Events:
        """Return what the program has done since it was loaded, on all CPUs.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        counts = self._read().sum(axis=0)
        return Events._make((*counts.tolist(), self.missed_events()))

    @map_errors()
    def listener_changes(self) -> int:
        """Return how many listeners have appeared or disappeared, as in `Events`.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        return int(self._read()[:, EVENT_KINDS.index("listener_changes")].sum())

    def _read(self) -> npt.NDArray[np.uint64]:
        """Return the counters of each CPU, in the order of `EVENT_KINDS`."""
        counts = np.zeros((self._cpus, len(EVENT_KINDS)), np.uint64)
        self._counters.read(FIRST, counts)
        return counts

    @map_errors()
    def missed_events(self) -> int:
        """Return the number of events for which the kernel skipped the program.

        A kernel with `features.RECURSION_MISSES` skips the program while it is running on
        the same CPU, and counts that. On other kernels the program can interrupt itself,
        and no event is missed.

        Since Linux 7 this does not require an interrupt: a task can be preempted in a
        tracepoint ("tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with
        SRCU-fast"). Then events of the next task on that CPU are missed, as tried on 7.3.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        info = program_info(self._program)
        return int(info[RECURSION_MISSES_BYTES // info.itemsize])
