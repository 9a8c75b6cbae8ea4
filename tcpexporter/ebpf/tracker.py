# SPDX-License-Identifier: GPL-3.0-only
"""The live array of connections: reads it, adds seeds to it, takes from it.

The BPF program and this module write to the same connections, each to those whose
slots it owns (bpf/tcp_tracker.c says what that is). Only one thread may call what
changes anything; any may read.

Reading at any time
-------------------
A connection is where ``group`` is not 0. Whoever reads does so before reading
``established_ns``; the program writes ``group`` last when a connection opens, and alone
when it closes. On a CPU that keeps stores in order (all x86), against that:

a. Open all the while: counted once, with its own time. It stays in its slot.
b. Closes after ``group`` was read: counted, with its own time; it was there.
c. As b, and another opens in its slot before ``established_ns`` is read: counted under
   the group of the first, with the time of the second, so as one that has just opened.
d. Opens after ``group`` was read: not counted. It was not there.

Giving slots back
-----------------
The program keeps the slot of a connection that has closed for the next socket at that
address. `Tracker.release` takes back such a slot, or that of a connection whose closing
was missed: it (1) deletes the handles, so that no run of the program that begins from
now on finds the slots; (2) waits until all runs have ended that began before; (3) looks
whether the connections are still those that it was asked to release, gives their slots
back, and (4) restores the handles of the others. For a handle, against those steps:

e. Nothing happens to its socket: released.
f. The socket at that address opens or closes before 1: what it wrote differs in time,
   so 4 restores it; or it closed, which is no reason to keep it.
g. A run found the slot before 1 and writes to it after 1: it has ended when 3 looks,
   so as f. That is why 3 must not come before 2: two connections would share the slot.
   The run can be between its store of the new time and its store of ``group`` when
   `_release_empty` reads them: the slot looks empty, and its time does not change any
   more. So for a slot that was chosen because it was empty, 3 also compares ``group``.
h. The socket opens after 1: the program finds no handle and takes another slot. The
   old one is released.
i. As g, an opening, and that connection closes between 1 and 4: the program finds no
   handle, and what 4 restores is a connection whose closing was missed. `restored`
   counts those, and is a reason to reconcile.
j. As i, and the socket opens once more before 4: it has another slot by then, the
   handle is there already, and what was to be restored is released.

k. A run has found the entry of a handle and not yet read its value; 1 deletes the entry,
   and the kernel uses its memory for another handle at once. The run reads the slot of
   that one. The program compares the handle in the slot's record, which is another or 0,
   and treats its own as not found: h.
l. The kernel refuses 1 or 2: all handles are restored and nothing is released. A slot
   whose handle cannot be restored, or has another slot by now, has no handle any more:
   it is an orphan, which `reclaim` frees when nothing is open there.

So a slot is freed by the thread that has deleted its only handle, once no run of the
program can write to it, and never has two owners; and `release` either frees a slot,
restores its handle, or keeps it as an orphan, so none is lost.
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
"""Closed connections may keep that many slots, besides as many as there are open ones."""

RECURSION_MISSES_BYTES = 208
"""Where it is in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""

EVENT_KINDS = ("inserted", "removed", "refused", "removed_seeds", "taken", "forgotten")
"""``struct tracker_events``, in its order."""


@contextlib.contextmanager
def map_errors() -> Iterator[None]:
    """Raise each error of a map operation as a `TrackerError`."""
    try:
        yield
    except OSError as error:
        raise TrackerError(error.strerror) from error


class Tracker:
    """The connections that the BPF program tells of, and seeds from the socket tables."""

    def __init__(self, descriptors: Descriptors, max_connections: int) -> None:
        """Take over a program and its maps, made for that many connections.

        Raises:
            TrackerError: the kernel refuses to map them.
        """
        self.seeds_refused = 0
        """For how many seeds there has been no room, each time that they were added."""
        self.restored = 0
        """How many connections kept their slots, as they had changed (i) or the kernel
        refused to release them (l). The program may have missed their closings."""
        self._descriptors = descriptors
        self._slots = max_connections
        self._handles = Map(descriptors.slots, "slots")
        self._free_slots = Map(descriptors.free_slots, "free slots")
        self._closings = Map(descriptors.closings, "closings")
        self._watched = Map(descriptors.watched, "watchers")
        self._counters = Map(descriptors.events, "events")
        self._barrier = Map(descriptors.barrier, "maps")
        with map_errors():
            self._array = MappedArray(
                descriptors.connections, CONNECTION, max_connections, WINDOW
            )
        self._seed_slots: Slots = np.empty(0, np.uint32)
        self._orphans: list[int] = []
        self._seeds_added = 0
        self._seeds_closed = 0
        self._closed = 0
        self._slots_taken = 0
        self._slots_given = 0
        self._cpus = possible_cpus(Path("/sys/devices/system/cpu/possible").read_text())

    def close(self) -> None:
        """Detach the program; nothing of it is left in the kernel."""
        self._descriptors.close()

    # Reading

    def read(self) -> Iterator[Records]:
        """Every connection, in chunks of dtype `CONNECTION` with other places between.

        They are the kernel's own: read ``group``, then the rest. What is there throughout
        is read exactly once; what comes or goes meanwhile may or may not be.

        Raises:
            TrackerError: the kernel refuses it.
        """
        with map_errors():
            yield from windows(self._array, self._slots)

    @map_errors()
    def known(self) -> Known:
        """Every connection as it is now; one that changes meanwhile may be left out.

        Raises:
            TrackerError: the kernel refuses it.
        """
        return known_in(self._array, self._slots)

    def seeds(self) -> int:
        """How many connections the program was not told of.

        Raises:
            TrackerError: the kernel refuses it.
        """
        closed = self._seeds_closed + self._events()["removed_seeds"]
        return self._seeds_added - closed

    def events(self) -> dict[str, int]:
        """What the program did since it was loaded, over all CPUs.

        Raises:
            TrackerError: the kernel refuses it.
        """
        events = self._events()
        return {kind: events[kind] for kind in ("inserted", "removed", "refused")}

    def unrecorded_closings(self) -> int:
        """How many closings were not recorded, as the closings log was full.

        Raises:
            TrackerError: the kernel refuses it.
        """
        return self._events()["forgotten"]

    @map_errors()
    def _events(self) -> dict[str, int]:
        counts = np.zeros((self._cpus, len(EVENT_KINDS)), np.uint64)
        self._counters.read(FIRST, counts)
        return dict(zip(EVENT_KINDS, counts.sum(axis=0).tolist(), strict=True))

    @map_errors()
    def missed_events(self) -> int:
        """For how many events the kernel did not run the program: it was running already.

        A kernel that has `features.RECURSION_MISSES` prevents that, and counts it. In
        others the program runs within itself, and no event is missed.

        Running already does not take an interrupt since Linux 7, as 7.3 shows, where a
        task can be preempted in a tracepoint ("tracing: Guard __DECLARE_TRACE() use of
        __DO_TRACE_CALL() with SRCU-fast"): what the next one on that CPU does is missed.

        Raises:
            TrackerError: the kernel refuses it.
        """
        info = program_info(self._descriptors.program)
        return int(info[RECURSION_MISSES_BYTES // info.itemsize])

    # Adding

    def add(self, seeds: Records) -> Slots:
        """Add connections of dtype `SOCKET` from the socket tables.

        Returns:
            The slots of those that found room. One that has the key of another seed is
            not told apart from it.

        Raises:
            TrackerError: the kernel refuses it.
        """
        self._release_empty(self._seed_slots)
        handles = hashes(seeds["key"]) | HANDLE_SEEDED
        _, first = np.unique(handles, return_index=True)
        is_new = np.zeros(len(seeds), np.bool_)
        is_new[first] = True
        is_new &= ~np.isin(handles, self._all()["handle"][self._seed_slots])
        chosen = np.flatnonzero(is_new)
        slots = self._take(len(chosen))
        for at in range(0, len(slots), WINDOW):
            of = chosen[at : at + WINDOW][: len(slots) - at]
            if not self._put(slots[at : at + WINDOW], seeds[of], handles[of]):
                self._give(slots[at:])
                slots = slots[:at]
                break
        self._seed_slots = np.concatenate((self._seed_slots, slots))
        self._seeds_added += len(slots)
        self.seeds_refused += len(chosen) - len(slots)
        return slots

    @map_errors()
    def _put(self, slots: Slots, seeds: Records, handles: Hashes) -> bool:
        """Whether there was room for all of them; else there is none of them."""
        connections = np.zeros(len(seeds), CONNECTION)
        connections["established_ns"] = seeds["established_ns"]
        connections["key"] = seeds["key"]
        connections["handle"] = handles
        everything = self._array.upto(int(slots.max()) + 1)
        everything[slots] = connections
        done = self._handles.put_all(handles, slots)
        if done == len(slots):
            # Not before the program finds it: it would miss that it closes.
            everything["group"][slots] = seeds["group"]
            return True
        self._handles.delete_all(handles[:done])
        self.wait_for_runs()  # as in `release`: a run may have found one of them
        everything["handle"][slots] = 0
        return False

    @map_errors()
    def _take(self, wanted: int) -> Slots:
        """As many free slots, or all there are; ascending in long runs."""
        parts = [np.empty(0, np.uint32)]
        lacking = wanted
        while lacking > 0 and (popped := self._free_slots.pop(np.uint32)) is not None:
            slots = slots_of(int(popped))
            # It may be a while until they are used, and whoever reads is not to stop here.
            self._array.upto(int(slots[-1]) + 1)["key"]["netns"][slots] = 1
            parts.append(slots)
            lacking -= len(slots)
        taken = np.concatenate(parts)
        self._slots_taken += len(taken)
        self._give(taken[wanted:])
        return taken[:wanted]

    # Taking out

    @contextlib.contextmanager
    def recording_closings(self) -> Iterator[None]:
        """Have the program record what closes until the end of the block.

        Every run of the program that does not do so has ended when the block begins, and
        every run that does has ended when the block has.

        Raises:
            TrackerError: the kernel refuses it.
        """
        self._take_closings()
        self._record_closings(True)
        try:
            self.wait_for_runs()
            yield
        finally:
            self._record_closings(False)
            self.wait_for_runs()

    @map_errors()
    def _record_closings(self, is_recording: bool) -> None:
        self._watched.put(FIRST, np.uint32(is_recording))

    def release_closed(self, slots: Slots) -> int:
        """Forget the seeds at ``slots`` that have closed since `recording_closings` began.

        Returns:
            How many that were.

        Raises:
            TrackerError: the kernel refuses it.
        """
        connections = self._all()
        has_closed = np.isin(connections["handle"][slots], self._take_closings())
        closed = slots[has_closed]
        return self.release(closed, connections["established_ns"][closed])

    @map_errors()
    def _take_closings(self) -> Hashes:
        handles, _ = self._closings.items(np.uint64, np.uint32, take=True)
        return handles

    def release(
        self,
        slots: Slots,
        established_ns: npt.NDArray[np.uint64],
        *,
        if_empty: bool = False,
    ) -> int:
        """Forget connections, as argued above, whether they are open or not.

        Args:
            slots: where they are, each once.
            established_ns: when they were established; one that has another time now
                stays.
            if_empty: whether a slot with an open connection stays, too.

        Returns:
            How many of them were open.

        Raises:
            TrackerError: the kernel refuses it.
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
                self._restore_or_orphan(handle, slot)
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
        if self._orphans:
            self._orphans = sorted({*self._orphans} - {*released.tolist()})
        self._give(released)
        return int(was_open.sum())

    def reclaim(self) -> None:
        """Take slots back from closed connections, where these keep too many.

        Raises:
            TrackerError: the kernel refuses it.
        """
        if self._orphans:
            self._release_empty(np.array(self._orphans, np.uint32))
        events = self._events()
        kept = events["taken"] + self._slots_taken - self._slots_given
        opened = events["inserted"] + self._seeds_added
        still_open = opened - events["removed"] - self._closed
        spare = min(still_open + SPARE_SLOTS, (self._slots - still_open) // 2)
        if kept - still_open > spare:
            self._release_empty(np.flatnonzero(self._all()["handle"]).astype(np.uint32))

    def _release_empty(self, slots: Slots) -> None:
        """Those among ``slots`` where no connection is."""
        connections = self._all()
        established_ns = connections["established_ns"][slots]
        # In this order: one that opens in between has another time, and stays.
        is_closed = connections["group"][slots] == 0
        self.release(slots[is_closed], established_ns[is_closed], if_empty=True)

    @map_errors()
    def _restore(self, handle: np.uint64, slot: np.uint32) -> bool:
        """Whether the handle has its slot again; it has another one by now otherwise."""
        restored = bool(handle) and self._handles.put_new(handle, slot)
        self.restored += restored
        return restored

    def _restore_or_orphan(self, handle: np.uint64, slot: np.uint32) -> None:
        with contextlib.suppress(TrackerError):
            if self._restore(handle, slot):
                return
        # A later release of this slot must not delete the entry that has the handle now.
        self._all()["handle"][slot] = 0
        self._orphans.append(int(slot))
        self.restored += 1

    @map_errors()
    def _give(self, slots: Slots) -> None:
        """Make slots free, so that the first is the next to be taken."""
        for each in reversed(ranges(slots).tolist()):
            self._free_slots.push(np.uint32(each))
        self._slots_given += len(slots)

    @map_errors()
    def wait_for_runs(self) -> None:
        """Return when every run of the program has ended that is under way now.

        The kernel waits for that after each change to a map of maps, by synchronize_rcu():
        Linux kernel commit 1ae80cf31938 ("bpf: wait for running BPF programs when updating
        map-in-map") (in v4.20). So every softirq that is under way now has ended, too, and
        has stored the state of the socket that it reported or missed.

        Raises:
            TrackerError: the kernel refuses it.
        """
        self._barrier.put(FIRST, np.uint32(self._descriptors.events))

    def _all(self) -> Records:
        """Every slot that has ever been used; the rest need not be mapped."""
        used = 0
        for window in self.read():
            used += len(window)
        return self._array.upto(used)
