# SPDX-License-Identifier: GPL-3.0-only
"""Reads the connections that the BPF program records, adds seeds to them and frees slots.

The BPF program and this module write to the same array. Each writes only to the slots that
it owns, as bpf/tcp_tracker.c defines. Only one thread may call the methods that change
anything. Any thread may call the methods that read.

Reading at any time
-------------------
A slot has a connection if its word has a series number. The program stores the word last
when a connection opens, and stores `CLOSED` when it closes. A reader that counts reads only
the words, each once. So a connection is counted like this on any CPU (`memory_order`):

a. Open all the while: counted once, in its series, with its own time. It keeps its slot.
b. Closes after its word was read: counted. It was open.
c. As b, and another opens in its slot: that one is not counted. It was not open.
d. Opens after the word of its slot was read: not counted. It was not open.

Freeing slots
-------------
The program keeps the slot of a closed connection for the next socket at the same address.
`Tracker.release` frees such a slot, or the slot of a connection whose closing was missed.
It has four steps:

1. Delete the handles, so that runs of the program that begin later do not find the slots.
2. Wait until all runs that began before have ended.
3. Check whether the slots still have the connections to release. If so, free the slots.
4. Restore the handles of the other slots.

The caches of the program are off meanwhile. These are the cases for a handle:

e. Nothing happens to its socket: the slot is freed.
f. The socket at that address opens or closes before 1. An opening stores another word, so 4
   restores the handle. After a closing, the slot is freed.
g. A run found the slot before 1 and writes to it after 1. The run has ended when 3 checks,
   so this is case f. Therefore 2 comes before 3: otherwise two connections would share the
   slot.
h. The socket opens after 1: the program finds no handle and allocates another slot. The old
   slot is freed.
i. As g, an opening, and that connection closes between 1 and 4: the program finds no
   handle, and 4 restores a connection whose closing was missed. `restored` counts these
   connections, and is a reason to reconcile.
j. As i, and the socket opens once more before 4: by then it has another slot and its handle
   exists again, so 4 cannot restore the old slot and frees it. The connection in it counts
   as closed.
k. A run has found the entry of a handle, but has not read its value yet. Step 1 deletes the
   entry, and the kernel uses its memory for another handle at once. Then the run reads the
   slot of the other handle. The program compares its handle with the one in the record of
   the slot. They differ, so it treats its handle as not found: case h.
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

import numpy as np

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.identity import (
    are_new,
    client_hashes,
    hashes,
    is_first,
)
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.parts import Parts
from tcpexporter.connections.record import (
    CLOSED,
    CONNECTION,
    Numbers,
    Records,
    Words,
    words,
)
from tcpexporter.connections.record import numbers as numbers_of
from tcpexporter.connections.series import series_of
from tcpexporter.connections.sets import is_in
from tcpexporter.ebpf.closings_log import ClosingsLog
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED, WINDOW, ConnectionArray, Known
from tcpexporter.ebpf.event_counters import EventCounters, Events
from tcpexporter.ebpf.free_numbers import FreeNumbers, Slots
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.maps import Map, map_errors
from tcpexporter.ebpf.runs import Runs
from tcpexporter.ebpf.series_numbers import SeriesNumbers
from tcpexporter.errors import TrackerError

SPARE_SLOTS = 4096
"""Closed connections may keep this number of slots, plus one per open connection, but at
most half of the slots without an open connection."""


class Tracker(EventCounters):
    """The connections that the BPF program reports, and seeds from the socket tables."""

    def __init__(
        self,
        descriptors: Descriptors,
        max_connections: int,
        parts: Parts,
        series: SeriesNumbers,
        runs: Runs,
    ) -> None:
        """Use a loaded program and its maps, which `close` closes.

        Args:
            descriptors: of the program and its maps.
            max_connections: the number of slots that the maps were made for.
            parts: what the program counts separately.
            series: the series numbers of the program.
            runs: the runs of the program.

        Raises:
            TrackerError: the kernel refuses to map the array of connections.
        """
        super().__init__(descriptors)
        self.seeds_refused = 0
        """Number of seeds that found no free slot; each attempt to add a seed counts."""
        self.restored = 0
        """How many connections kept their slots because they had changed (i) or the kernel
        refused to release them (l). The program may have missed their closings."""
        self.series = series
        self.runs = runs
        self._parts = parts
        self._descriptors = descriptors
        self._slots = max_connections
        self._handles = Map(descriptors.slots, "slots")
        self._free_slots = FreeNumbers(descriptors.free_slots, "free slots")
        self._closings = ClosingsLog(descriptors, runs)
        with map_errors():
            self._array = ConnectionArray(
                descriptors.connections,
                descriptors.series_and_time,
                max_connections,
                clients=descriptors.clients if parts.client_masks else None,
            )
        self._seed_slots: Slots = np.empty(0, np.uint32)
        self._orphans: set[int] = set()
        self._added: Numbers = np.empty(0, np.uint32)
        """The series numbers of the seeds that are not yet in the ledger."""
        self._seeds_added = self._seeds_closed = self._closed = 0
        self._slots_allocated = self._slots_freed = 0

    def close(self) -> None:
        """Detach the program and free its maps, unless they are pinned."""
        self._descriptors.close()

    # Reading

    def read(self) -> Iterator[tuple[Records, Words]]:
        """Yield the records and words of all slots that were ever used, in chunks.

        The records have dtype `CONNECTION`. The chunks are the kernel's memory. A
        connection that stays open is read exactly once; one that opens or closes meanwhile,
        at most once.

        Raises:
            TrackerError: the kernel refuses to map the arrays.
        """
        with map_errors():
            yield from self._array.windows()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the words and clients of all slots that were ever used.

        Raises:
            TrackerError: the kernel refuses to map the arrays.
        """
        with map_errors():
            yield self._array.chunk()

    def words(self) -> Iterator[Words]:
        """Yield the words of the chunks of `read`.

        Raises:
            TrackerError: the kernel refuses to map the array.
        """
        with map_errors():
            yield from self._array.word_windows()

    @map_errors()
    def known(self, *, with_seeds: bool = True) -> Known:
        """Return all connections; connections that change meanwhile may be missing.

        Args:
            with_seeds: whether to return seeds too.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        return self._array.known() if with_seeds else self._array.reported(self._seed_slots)

    def seeds(self, events: Events) -> int:
        """Return how many of the connections are seeds.

        Args:
            events: those of this tracker, just read.
        """
        return self._seeds_added - self._seeds_closed - events.removed_seeds

    # Adding

    def add(self, seeds: Records) -> Slots:
        """Add connections of dtype `SOCKET` from the socket tables.

        Connections with the same key cannot be distinguished. The first of them becomes a
        seed, unless a seed with that key exists. `release_closed` adds them to the ledger.

        Args:
            seeds: the connections.

        Returns:
            The slots of the new seeds. There may be fewer seeds for lack of free slots.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        handles = hashes(seeds["key"]) | HANDLE_SEEDED
        is_new = is_first(handles)
        is_new &= are_new(handles, self._used()[0]["handle"][self._seed_slots])
        if not is_new.all():  # usually all are new; then this would only copy them
            seeds, handles = seeds[is_new], handles[is_new]
        numbers = self.series.numbers(series_of(seeds, self._parts))
        slots = self._allocate(len(seeds))
        self.seeds_refused += len(seeds) - len(slots)
        for at in range(0, len(slots), WINDOW):
            batch = slots[at : at + WINDOW]
            rows = slice(at, at + len(batch))
            new = np.zeros(len(batch), CONNECTION)
            new["handle"] = handles[rows]
            for field in ("key", "is_outbound", "cgroup"):
                new[field] = seeds[field][rows]
            new_words = words(numbers[rows], seeds["established_ns"][rows])
            try:
                is_written = self._write_seeds(batch, new, new_words)
            except (TrackerError, MemoryError):
                for slot in slots[at:]:  # the map may have the handles of some
                    self._orphan(slot)
                raise
            if not is_written:
                self._free(slots[at:])
                self.seeds_refused += len(slots) - at
                return slots[:at]
            self._added = np.concatenate((self._added, numbers[rows]))
            self._seed_slots = np.concatenate((self._seed_slots, batch))
            self._seeds_added += len(batch)
        return slots

    @map_errors()
    def _write_seeds(self, slots: Slots, seeds: Records, seed_words: Words) -> bool:
        """Write all seeds and return True; or none, if the map cannot hold all of them."""
        all_words = self._array.words_upto(int(slots.max()) + 1)
        records, at = self._array.records_of(slots)
        records[at] = seeds
        if masks := self._parts.client_masks:
            self._array.put_clients(slots, client_hashes(seeds["key"], masks))
        done = self._handles.put_all(seeds["handle"].copy(), slots)
        if done == len(slots):
            # Readers may count a seed only when the program finds it and sees its closing.
            memory_barrier()
            all_words[slots] = seed_words
            return True
        with self.runs.without_caches():
            self._handles.delete_all(seeds["handle"][:done])
            self.runs.wait()  # as in `release`: a run may have found one of the slots
        records["handle"][at] = 0
        return False

    @map_errors()
    def _allocate(self, wanted: int) -> Slots:
        """Return ``wanted`` free slots, or all free slots if there are fewer."""
        popped = [np.empty(0, np.uint32)]
        missing = wanted
        while missing > 0 and (slots := self._free_slots.pop()) is not None:
            # So that reading does not stop here before the slots are used.
            self._array.words_upto(int(slots[-1]) + 1)[slots] = CLOSED
            popped.append(slots)
            missing -= len(slots)
        taken = np.concatenate(popped)
        self._slots_allocated += len(taken)
        self._free(taken[wanted:])
        return taken[:wanted]

    # Removing

    @contextlib.contextmanager
    def recording_closings(self) -> Iterator[None]:
        """Record closings during the block, as `ClosingsLog.recording` does.

        Before it, slots of closed seeds are freed. In the block a slot must not be freed
        and allocated again: it would be in the result of `add` twice.
        """
        self._release_empty(self._seed_slots)
        self._added = self._added[:0]
        try:
            with self._closings.recording():
                yield
        finally:  # after an error; otherwise `release_closed` has recorded them
            self.series.record_seeds(self._added, pre_existing=False)

    def release_closed(self, slots: Slots, *, pre_existing: bool = False) -> int:
        """Release the seeds at ``slots`` whose closing was recorded, and clear the log.

        The others are added to the ledger only now, because a counter must not decrease.

        Args:
            slots: all that `add` has returned since the block of `recording_closings`
                began, in order.
            pre_existing: whether they count as pre-existing; if not, they count as opened.

        Returns:
            How many of them were still open in the array, although they had closed.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        removed = slots[:0]
        try:
            removed, _ = self._release_recorded(slots)
        finally:
            stayed = self._added[~is_in(slots, removed)]
            self.series.record_seeds(stayed, pre_existing=pre_existing)
            self._added = self._added[:0]
        self.runs.wait()  # e of `reconcile`
        _, late = self._release_recorded(slots)
        self.series.record_closed(late, boottime_ns())
        return len(removed) + len(late)

    def _release_recorded(self, slots: Slots) -> tuple[Slots, Words]:
        records, all_words = self._used()
        closings = self._closings.pop()
        if not len(closings):
            # This is usual, and copying a million handles takes 40 ms.
            return slots[:0], all_words[:0]
        closed = slots[is_in(records["handle"][slots], closings)]
        with self.runs.without_caches():
            return self._release(closed, all_words[closed])

    def release(self, slots: Slots, words: Words) -> int:
        """Remove connections and free their slots; the module's docstring has the cases.

        Args:
            slots: the slots of the connections, without duplicates.
            words: the expected word of each; a slot with another one stays, unless it has
                no connection.

        Returns:
            How many of the removed connections were open. The ledger has them as closed.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        with self.runs.without_caches():
            _, removed = self._release(slots, words)
        self.series.record_closed(removed, boottime_ns())
        return len(removed)

    def _release(self, slots: Slots, words: Words) -> tuple[Slots, Words]:
        """Remove connections as `release` does, while the caches are off.

        Returns:
            The slots and words of those that were open. The caller adds them to the ledger.
        """
        if not len(slots):
            return slots, words
        records, all_words = self._used()
        handles = records["handle"][slots]
        try:
            with map_errors():
                self._handles.delete_all(handles)
            self.runs.wait()
            now = all_words[slots]
            has_changed = (now != words) & (numbers_of(now) != 0)
        except (TrackerError, MemoryError):  # l
            for handle, slot in zip(handles, slots, strict=True):
                if not self._restore(handle, slot):
                    self._orphan(slot)
            raise
        for at in np.flatnonzero(has_changed):
            has_changed[at] = self._restore(handles[at], slots[at])
        released = np.sort(slots[~has_changed])
        found = all_words[released]
        was_open = numbers_of(found) != 0
        was_seed = records["handle"][released] & HANDLE_SEEDED != 0
        all_words[released] = CLOSED
        records["handle"][released] = 0
        self._closed += int(was_open.sum())
        self._seeds_closed += int((was_open & was_seed).sum())
        self._seed_slots = np.setdiff1d(self._seed_slots, released, assume_unique=True)
        self._orphans.difference_update(released.tolist())
        self._free(released)
        return released[was_open], found[was_open]

    def reclaim(self) -> None:
        """Free orphans, slots if closed connections keep too many, and series numbers.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if self._orphans:
            self._release_empty(np.array(sorted(self._orphans), np.uint32))
        events = self.events()
        kept = events.allocated + self._slots_allocated - self._slots_freed
        opened = events.inserted + self._seeds_added
        still_open = opened - events.removed - self._closed
        spare = min(still_open + SPARE_SLOTS, (self._slots - still_open) // 2)
        if kept - still_open > spare:
            records, _ = self._used()
            self._release_empty(np.flatnonzero(records["handle"]).astype(np.uint32))
        self.series.reclaim(self.words)

    def _release_empty(self, slots: Slots) -> None:
        """Release those of ``slots`` that have no open connection."""
        _, all_words = self._used()
        with self.runs.without_caches():
            empty = slots[numbers_of(all_words[slots]) == 0]
            _, removed = self._release(empty, np.full(len(empty), CLOSED))
        self.series.record_closed(removed, boottime_ns())

    def _restore(self, handle: np.uint64, slot: np.uint32) -> bool:
        """Restore a handle and return True; or False if it is 0 or has another slot."""
        try:
            restored = bool(handle) and self._handles.put_new(handle, slot)
        except OSError:
            self._orphan(slot)
            return True
        self.restored += restored
        return restored

    @map_errors()
    def _orphan(self, slot: np.uint32) -> None:
        # A later release of this slot must not delete the entry of the handle.
        records, at = self._array.records_of(np.array([slot], np.uint32))
        records["handle"][at] = 0
        self._orphans.add(int(slot))
        self.restored += 1

    @map_errors()
    def _free(self, slots: Slots) -> None:
        """Free slots; the first is the next to be allocated."""
        self._free_slots.push(slots)
        self._slots_freed += len(slots)

    @map_errors()
    def _used(self) -> tuple[Records, Words]:
        """Return the records and words of all slots that were ever used."""
        return self._array.used()
