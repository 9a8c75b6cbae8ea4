# SPDX-License-Identifier: GPL-3.0-only
"""Reads the connections that the BPF program records, adds seeds to them and frees slots.

The BPF program and this module write to the same array. Each writes only to the slots that
it owns, as bpf/tcp_tracker.c defines. Only one thread may call the methods that change
anything. Any thread may call the methods that read.

Reading while the program writes
--------------------------------
A slot has a connection if ``group`` is not 0. A reader reads ``group`` before
``established_ns``. The program writes ``group`` last when a connection opens, and writes
only ``group`` when it closes. On a CPU that keeps stores in order (all x86), these are the
cases for a connection:

a. Stays open: counted once, with its own time. It stays in its slot.
b. Closes after ``group`` was read: counted, with its own time. It was open.
c. As b, and another connection opens in the slot before ``established_ns`` is read: counted
   once, as a new connection: with the group of the first and the time of the second.
d. Opens after ``group`` was read: not counted. It was not open.

Freeing slots
-------------
The program keeps the slot of a closed connection for the next socket at the same address.
`Tracker.release` frees such a slot, or the slot of a connection whose closing was missed.
It has four steps:

1. delete the handles, so that runs of the program that begin later do not find the slots;
2. wait until all runs that began before have ended;
3. check whether the slots still have the connections to release; if so, free them;
4. restore the handles of the other slots.

These are the cases for a handle:

e. The socket does not change: the slot is freed.
f. The socket at that address opens or closes before 1: an opening writes another time, so 4
   restores the handle. After a closing, the slot is freed.
g. A run found the slot before 1 and writes to it after 1: the run has ended when 3 checks,
   so this is case f. Therefore 2 must come before 3: otherwise two connections would share
   the slot. `_release_empty` can read the slot between the run's stores of the new time and
   of ``group``. Then the slot looks empty, and its time does not change again. So if a slot
   was chosen because it was empty, 3 also checks ``group``.
h. The socket opens after 1: the program allocates another slot, and the old one is freed.
i. As g, and the connection that the run opened closes between 1 and 4. The program finds no
   handle, so the closing is missed, and 4 restores the connection. `restored` counts these
   connections, and a reconciliation follows.
j. As i, and the socket opens again before 4: then it has another slot, and its handle
   exists again. So 4 cannot restore the old slot, and frees it.
k. A run has found the entry of a handle, but has not read its value yet. Step 1 deletes the
   entry, and the kernel uses its memory for another handle at once. Then the run reads the
   slot of the other handle. The program compares its handle with the handle in the record
   of the slot. They differ, so the program treats its handle as not found: case h.
l. The kernel refuses 1 or 2: all handles are restored, and no slot is freed. If a handle
   has another slot by now, its old slot has no handle: the slot is an *orphan*. `reclaim`
   frees an orphan when it has no open connection. A slot is also an orphan if the kernel
   refuses to restore its handle, here or in 4.

So only the thread that has deleted the only handle of a slot frees it, when no run of the
program can write to it. A slot never has two owners. `release` frees a slot, restores its
handle, or keeps it as an orphan, so no slot is lost.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import Hashes, hashes
from tcpexporter.connections.record import CONNECTION, Records
from tcpexporter.ebpf.connection_array import (
    HANDLE_SEEDED,
    WINDOW,
    Known,
    known_in,
    windows,
)
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import FIRST, Map, possible_cpus, program_info
from tcpexporter.ebpf.slot_ranges import Slots, ranges, slots_of
from tcpexporter.errors import TrackerError

SPARE_SLOTS = 4096
"""Closed connections may keep this number of slots, plus one per open connection."""

RECURSION_MISSES_BYTES = 208
"""Offset of ``recursion_misses`` in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""

EVENT_KINDS = ("inserted", "removed", "refused", "removed_seeds", "allocated", "unrecorded")
"""The fields of ``struct tracker_events``, in their order."""


@contextlib.contextmanager
def map_errors() -> Iterator[None]:
    """Raise each OSError of the block as a `TrackerError`; the block only calls `maps`."""
    try:
        yield
    except OSError as error:
        raise TrackerError(error.strerror) from error


class Tracker:
    """The connections that the BPF program reports, and seeds from the socket tables."""

    def __init__(self, descriptors: Descriptors, max_connections: int) -> None:
        """Use a loaded program and its maps; `close` closes them.

        Args:
            descriptors: the descriptors of the program and its maps.
            max_connections: the number of slots of the maps.

        Raises:
            TrackerError: the kernel refuses to map the array of connections.
        """
        self.seeds_refused = 0
        """Number of seeds that found no free slot; each attempt to add a seed counts."""
        self.restored = 0
        """Number of connections that kept their slots: cases i and l. The program may have
        missed their closings."""
        self._descriptors = descriptors
        self._slots = max_connections
        self._handles = Map(descriptors.slots, "slots")
        self._free_slots = Map(descriptors.free_slots, "free slots")
        self._closings = Map(descriptors.closings, "closings")
        self._recording = Map(descriptors.recording, "recording")
        self._counters = Map(descriptors.events, "events")
        self._barrier = Map(descriptors.barrier, "barrier")
        with map_errors():
            self._array = MappedArray(
                descriptors.connections, CONNECTION, max_connections, WINDOW
            )
        self._seed_slots: Slots = np.empty(0, np.uint32)
        self._orphans: set[int] = set()
        self._seeds_added = 0
        self._seeds_closed = 0
        self._closed = 0
        self._slots_allocated = 0
        self._slots_freed = 0
        self._cpus = possible_cpus(Path("/sys/devices/system/cpu/possible").read_text())

    def close(self) -> None:
        """Detach the program and free its maps, unless they are pinned."""
        self._descriptors.close()

    # Reading

    def read(self) -> Iterator[Records]:
        """Yield all slots that were ever used, in chunks of dtype `CONNECTION`.

        The program may write to the chunks: read ``group`` before the other fields. A
        connection that stays open is in one slot, any other connection in at most one.

        Raises:
            TrackerError: the kernel refuses to map the array.
        """
        with map_errors():
            yield from windows(self._array, self._slots)

    @map_errors()
    def known(self) -> Known:
        """Return all connections; connections that change meanwhile may be missing.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        return known_in(self._array, self._slots)

    def seeds(self) -> int:
        """Return how many of the connections are seeds.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        closed = self._seeds_closed + self._events()["removed_seeds"]
        return self._seeds_added - closed

    def events(self) -> dict[str, int]:
        """Return how many connections the program has inserted, removed and refused.

        Returns:
            The numbers on all CPUs, with the keys ``inserted``, ``removed``, ``refused``.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        events = self._events()
        return {kind: events[kind] for kind in ("inserted", "removed", "refused")}

    def unrecorded_closings(self) -> int:
        """Return how many closings the full closings log has not recorded.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        return self._events()["unrecorded"]

    @map_errors()
    def _events(self) -> dict[str, int]:
        counts = np.zeros((self._cpus, len(EVENT_KINDS)), np.uint64)
        self._counters.read(FIRST, counts)
        return dict(zip(EVENT_KINDS, counts.sum(axis=0).tolist(), strict=True))

    @map_errors()
    def missed_events(self) -> int:
        """Return the number of events for which the kernel skipped the program.

        A kernel with `features.RECURSION_MISSES` skips the program while it is running on
        the same CPU, and counts that. On other kernels the program can interrupt itself,
        and no event is missed.

        Since Linux 7, a skip does not require an interrupt: a task can be preempted in a
        tracepoint ("tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with
        SRCU-fast"). Then events of the next task on that CPU are missed (tested on 7.3).

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        info = program_info(self._descriptors.program)
        return int(info[RECURSION_MISSES_BYTES // info.itemsize])

    # Adding

    def add(self, seeds: Records) -> Slots:
        """Add connections of dtype `SOCKET` from the socket tables.

        Connections with the same key cannot be distinguished. The first of them becomes a
        seed, unless a seed with that key exists.

        Returns:
            The slots of the new seeds. There may be fewer seeds for lack of free slots.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        self._release_empty(self._seed_slots)
        handles = hashes(seeds["key"]) | HANDLE_SEEDED
        _, first = np.unique(handles, return_index=True)
        is_new = np.zeros(len(seeds), np.bool_)
        is_new[first] = True
        is_new &= ~np.isin(handles, self._all()["handle"][self._seed_slots])
        chosen = np.flatnonzero(is_new)
        slots = self._allocate(len(chosen))
        for at in range(0, len(slots), WINDOW):
            of = chosen[at : at + WINDOW][: len(slots) - at]
            if not self._write_seeds(slots[at : at + WINDOW], seeds[of], handles[of]):
                self._free(slots[at:])
                slots = slots[:at]
                break
        self._seed_slots = np.concatenate((self._seed_slots, slots))
        self._seeds_added += len(slots)
        self.seeds_refused += len(chosen) - len(slots)
        return slots

    @map_errors()
    def _write_seeds(self, slots: Slots, seeds: Records, handles: Hashes) -> bool:
        """Write all seeds and return True; write none if not all fit into the map."""
        connections = np.zeros(len(seeds), CONNECTION)
        connections["established_ns"] = seeds["established_ns"]
        connections["key"] = seeds["key"]
        connections["handle"] = handles
        everything = self._array.upto(int(slots.max()) + 1)
        everything[slots] = connections
        done = self._handles.put_all(handles, slots)
        if done == len(slots):
            # Readers may count a seed only when the program can find it.
            everything["group"][slots] = seeds["group"]
            return True
        self._handles.delete_all(handles[:done])
        self.wait_for_runs()  # as in `release`: a run may have found one of the slots
        everything["handle"][slots] = 0
        return False

    @map_errors()
    def _allocate(self, wanted: int) -> Slots:
        """Return ``wanted`` free slots, or all free slots if there are fewer."""
        parts = [np.empty(0, np.uint32)]
        missing = wanted
        while missing > 0 and (popped := self._free_slots.pop(np.uint32)) is not None:
            slots = slots_of(int(popped))
            # A key in each slot: otherwise `windows` would stop at this gap.
            self._array.upto(int(slots[-1]) + 1)["key"]["netns"][slots] = 1
            parts.append(slots)
            missing -= len(slots)
        taken = np.concatenate(parts)
        self._slots_allocated += len(taken)
        self._free(taken[wanted:])
        return taken[:wanted]

    # Removing

    @contextlib.contextmanager
    def recording_closings(self) -> Iterator[None]:
        """Let the program record all closings in the closings log during the block.

        When the block begins, every run that does not record has ended. After the block,
        every run that records has ended.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        self._pop_closings()
        self._set_recording(True)
        try:
            self.wait_for_runs()
            yield
        finally:
            self._set_recording(False)
            self.wait_for_runs()

    @map_errors()
    def _set_recording(self, is_recording: bool) -> None:
        self._recording.put(FIRST, np.uint32(is_recording))

    def release_closed(self, slots: Slots) -> int:
        """Release the seeds at ``slots`` whose closing was recorded, and clear the log.

        Returns:
            How many of them were still open in the array.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        connections = self._all()
        has_closed = np.isin(connections["handle"][slots], self._pop_closings())
        closed = slots[has_closed]
        return self.release(closed, connections["established_ns"][closed])

    @map_errors()
    def _pop_closings(self) -> Hashes:
        handles, _ = self._closings.items(np.uint64, np.uint32, delete=True)
        return handles

    def release(
        self,
        slots: Slots,
        established_ns: npt.NDArray[np.uint64],
        *,
        if_empty: bool = False,
    ) -> int:
        """Remove connections and free their slots, in the steps that the module describes.

        Args:
            slots: the slots of the connections, without duplicates.
            established_ns: the expected times; a connection with another time is kept.
            if_empty: whether to keep open connections too.

        Returns:
            How many of the removed connections were open.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if not len(slots):
            return 0
        connections = self._all()
        handles = connections["handle"][slots]
        try:
            with map_errors():
                self._handles.delete_all(handles)
            self.wait_for_runs()
        except TrackerError:  # l
            for handle, slot in zip(handles, slots, strict=True):
                if not self._restore(handle, slot):
                    self._orphan(slot)
            raise
        has_changed = connections["established_ns"][slots] != established_ns
        if if_empty:
            has_changed |= connections["group"][slots] != 0
        for at in np.flatnonzero(has_changed):
            has_changed[at] = self._restore(handles[at], slots[at])
        released = np.sort(slots[~has_changed])
        was_open = connections["group"][released] != 0
        was_seed = connections["handle"][released] & HANDLE_SEEDED != 0
        connections["group"][released] = 0
        connections["handle"][released] = 0
        self._closed += int(was_open.sum())
        self._seeds_closed += int((was_open & was_seed).sum())
        self._seed_slots = np.setdiff1d(self._seed_slots, released, assume_unique=True)
        self._orphans.difference_update(released.tolist())
        self._free(released)
        return int(was_open.sum())

    def reclaim(self) -> None:
        """Free the slots of closed connections if there are too many; free orphans.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if self._orphans:
            self._release_empty(np.array(sorted(self._orphans), np.uint32))
        events = self._events()
        kept = events["allocated"] + self._slots_allocated - self._slots_freed
        opened = events["inserted"] + self._seeds_added
        still_open = opened - events["removed"] - self._closed
        spare = min(still_open + SPARE_SLOTS, (self._slots - still_open) // 2)
        if kept - still_open > spare:
            self._release_empty(np.flatnonzero(self._all()["handle"]).astype(np.uint32))

    def _release_empty(self, slots: Slots) -> None:
        """Free those of ``slots`` that have no open connection."""
        connections = self._all()
        established_ns = connections["established_ns"][slots]
        # In this order: a connection that opens in between has another time, and is kept.
        is_closed = connections["group"][slots] == 0
        self.release(slots[is_closed], established_ns[is_closed], if_empty=True)

    def _restore(self, handle: np.uint64, slot: np.uint32) -> bool:
        """Restore the handle of a slot; return False if the slot must be freed."""
        try:
            restored = bool(handle) and self._handles.put_new(handle, slot)
        except OSError:
            self._orphan(slot)
            return True
        self.restored += restored
        return restored

    def _orphan(self, slot: np.uint32) -> None:
        # A later release of this slot must not delete the entry of the handle.
        self._all()["handle"][slot] = 0
        self._orphans.add(int(slot))
        self.restored += 1

    @map_errors()
    def _free(self, slots: Slots) -> None:
        """Free slots; the first of them is allocated next."""
        for each in reversed(ranges(slots).tolist()):
            self._free_slots.push(np.uint32(each))
        self._slots_freed += len(slots)

    @map_errors()
    def wait_for_runs(self) -> None:
        """Wait until every run of the program that has begun has ended.

        After each change to a map of maps, the kernel waits for that by synchronize_rcu():
        Linux kernel commit 1ae80cf31938 ("bpf: wait for running BPF programs when updating
        map-in-map") (in v4.20). So every softirq that has begun has ended too, and has
        stored the state of the socket that it reported or missed.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        self._barrier.put(FIRST, np.uint32(self._descriptors.events))

    def _all(self) -> Records:
        """Return all slots that were ever used as one array; only these are mapped."""
        used = 0
        for window in self.read():
            used += len(window)
        return self._array.upto(used)
