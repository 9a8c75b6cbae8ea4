# SPDX-License-Identifier: GPL-3.0-only
"""Reads what the BPF program and the kernel have counted since the program was loaded."""

from pathlib import Path

import numpy as np

from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.maps import FIRST, Map, map_errors, possible_cpus, program_info

RECURSION_MISSES_BYTES = 208
"""Offset of ``recursion_misses`` in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""

EVENT_KINDS = ("inserted", "removed", "refused", "removed_seeds", "allocated", "unrecorded")
"""The fields of ``struct tracker_events``, in their order."""


class EventCounters:
    """The counters of a loaded program; any thread may read them."""

    def __init__(self, descriptors: Descriptors) -> None:
        """Use the descriptors of a program and its maps, which must stay open."""
        self._program = descriptors.program
        self._counters = Map(descriptors.events, "events")
        self._cpus = possible_cpus(Path("/sys/devices/system/cpu/possible").read_text())

    def events(self) -> dict[str, int]:
        """Return what the program has done since it was loaded, on all CPUs.

        Returns:
            Numbers of connections, with the keys ``inserted``, ``removed`` and ``refused``.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        events = self.all_events()
        return {kind: events[kind] for kind in ("inserted", "removed", "refused")}

    def unrecorded_closings(self) -> int:
        """Return how many closings were not recorded, because the closings log was full.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        return self.all_events()["unrecorded"]

    @map_errors()
    def all_events(self) -> dict[str, int]:
        """Return the sums over all CPUs, by the names in `EVENT_KINDS`.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        counts = np.zeros((self._cpus, len(EVENT_KINDS)), np.uint64)
        self._counters.read(FIRST, counts)
        return dict(zip(EVENT_KINDS, counts.sum(axis=0).tolist(), strict=True))

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
