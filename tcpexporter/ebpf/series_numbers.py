# SPDX-License-Identifier: GPL-3.0-only
"""Allocates and frees series numbers, and reads the ledger that the BPF program writes.

The program and this module allocate numbers; only this module frees them. A number is on
the stack of free numbers, or owned by the run or the thread that popped it, or the number
of one series: the ledger has that series at this number. Methods that change anything must
be called by one thread only; any thread may call `ledger`.

Freeing numbers
---------------
`SeriesNumbers.free` (1) deletes the series from the map, so that no run of the program that
begins from now on finds its number; (2) waits until all runs that began before have ended;
(3) frees the number if no connection has it; and (4) restores the others. The caches of the
program are off meanwhile. These are the cases for a series:

a. No connection is opened: freed.
b. A run found the number before 1 and stores a connection with it after 1: the run has
   ended when 3 looks, so the number is in use, and 4 restores it.
c. A connection opens after 1: the program finds no number and allocates another. The old
   one is freed, and its counters are added to those of the new one.
d. As b, and c happens before 4: the series has two numbers. The map has the new one; the
   ledger has the series at both, so both are counted. The old number is an orphan: it is
   freed later, when no connection has it.
e. A run has found the entry of a series and not yet read its value; 1 deletes the entry,
   and the kernel uses its memory for another series. The run reads the number of the other
   series. The program compares its series with the one in the ledger, and treats its own as
   not found: c.
f. Two runs, or a run and this module, allocate a number for the same series: the map takes
   the first. The other pushes its number back and uses the first. For an instant the ledger
   has the series at that number, too. It is neither in the map nor an orphan, so this
   module does not free it.
g. The kernel refuses 1 or a wait: all are restored and nothing is freed. A number that the
   kernel refuses to restore is an orphan.
h. As b, but that connection closes before 3 looks. A run stores that first, and then adds
   to the counters of the number. So 3 waits for all runs once more before it frees it.

`ledger` never shows the counters of a number twice while they are added to another one.
For the order of loads and stores, see the cases 7 to 9, 12 and 14 of `memory_order`.

If few numbers are free, those without connections are freed. Their counters are added to
those of the folded series: no sum over series decreases. When a network namespace is gone,
its numbers are freed, and their counters are forgotten: its series are not published any
more. Neither changes the sum opened - closed - open + pre-existing, because that is 0 for a
series without connections.
"""

import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import SERIES_FIRST, TIME_SHIFT
from tcpexporter.connections.record import SERIES_BITS, SERIES_MASK, Numbers, Words
from tcpexporter.connections.record import numbers as numbers_of
from tcpexporter.connections.series import (
    FOLDED,
    NO_SERIES,
    SERIES,
    Forgotten,
    Ledger,
    Series,
    bucket_count,
    correction_dtype,
    entry_dtype,
    folded_number,
    folded_series,
    grouped,
)
from tcpexporter.connections.sets import is_in
from tcpexporter.ebpf.free_numbers import FreeNumbers
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import Map, map_errors, possible_cpus
from tcpexporter.ebpf.ranges import SERIES_RANGE
from tcpexporter.ebpf.runs import Runs
from tcpexporter.errors import TrackerError

WINDOW = 256
"""Minimum number of entries that are mapped at once."""

UNTOUCHED_RANGES = 8
"""Minimum number of ranges without a used number after which no number was ever used.

Numbers are allocated in ascending order. A run of the program that allocates a number pops
a range, and pushes the rest of it. If a run is late, the next ranges have used numbers
already. On each CPU one run can be late, and one more that has interrupted it; so can a
thread of the exporter.
"""

FULL_SHARE = 0.75
"""From this share of numbers in use on, those without connections are freed."""


class SeriesNumbers:
    """The numbers of all series, and their ledger.

    The ledger is the sum of what the program has counted and of corrections that this
    module makes: connections that the program did not see opening or closing.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        runs: Runs,
        max_series: int,
        bounds: Sequence[int] = (),
    ) -> None:
        """Use the maps of a loaded program.

        Args:
            descriptors: of its maps.
            runs: the runs of the program.
            max_series: how many numbers there are, besides those of folded series.
            bounds: the bounds of lifetime buckets, as in `loader_protocol.Request`.

        Raises:
            TrackerError: the kernel refuses to map the ledger.
        """
        self.max_series = max_series
        self._runs = runs
        self._bounds = np.array(bounds, np.uint64)
        self._numbers = Map(descriptors.series_numbers, "series numbers")
        self._free = FreeNumbers(descriptors.free_series, "free series numbers")
        self._size = SERIES_FIRST + max_series
        self._untouched = SERIES_RANGE * max(UNTOUCHED_RANGES, 2 * possible_cpus() + 1)
        self._forgotten = Forgotten()
        self._orphans: set[int] = set()
        self._moving = threading.Lock()
        """Held while counters are added to those of another number."""
        self._mapped = 1
        """How many entries are mapped, or the least number of them."""
        self._growing = threading.Lock()
        """Held while entries are mapped; `_mapped` must not decrease."""
        buckets = bucket_count(bounds)
        with map_errors():
            self._ledger, self._corrections = (
                MappedArray(each, dtype, self._size, _window(dtype.itemsize))
                for each, dtype in (
                    (descriptors.ledger, entry_dtype(buckets)),
                    (descriptors.corrections, correction_dtype(buckets)),
                )
            )
            self._ledger.upto(SERIES_FIRST)["series"][:SERIES_FIRST] = folded_series()

    def forget(self, field: str, values: Iterable[int]) -> None:
        """Free the numbers of series with these values later; any thread may call this."""
        self._forgotten.add(field, values)

    def in_use(self) -> int:
        """Return how many numbers are in use.

        Raises:
            TrackerError: the kernel refuses to map the ledger.
        """
        _, is_used = self._entries_and_use()
        return int(np.count_nonzero(is_used[SERIES_FIRST:]))

    @map_errors()
    def ledger(self) -> Ledger:
        """Return what has happened in each series since the program was loaded or adopted.

        Raises:
            TrackerError: the kernel refuses to map the ledger.
        """
        entries, is_used = self._entries_and_use()
        used = int(np.flatnonzero(is_used)[-1]) + 1
        corrections = self._corrections.upto(used)
        with self._moving:
            return ledger_of(entries[:used], corrections[:used])

    def _entries(self) -> "npt.NDArray[np.void]":
        """Return all entries that were ever used."""
        return self._entries_and_use()[0]

    def _entries_and_use(self) -> "tuple[npt.NDArray[np.void], npt.NDArray[np.bool_]]":
        """Return all entries that were ever used, and which of them are in use."""
        with self._growing:
            entries = self._ledger.upto(self._mapped)
            is_used = _in_use(entries)
            while len(entries) < self._size and is_used[-self._untouched :].any():
                entries = self._ledger.upto(len(entries) + 1)  # and the rest of the window
                is_used = _in_use(entries)
            self._mapped = len(entries)
        return entries, is_used

    # Allocating

    @map_errors()
    def numbers(self, series: Series) -> Numbers:
        """Return the number of each series, and allocate those that are missing.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        wanted, place = grouped(series)
        # The ledger alone does not prove that a number is that of a series: f.
        is_folded = wanted.view(SERIES)["flags"] & FOLDED != 0
        numbers = folded_number(wanted)
        keys = _keys(wanted)
        for at in np.flatnonzero(~is_folded):
            numbers[at] = self._number_of(keys[at]) or self._allocate(keys[at])
        found: Numbers = numbers[place]
        return found

    def _allocate(self, series: np.void) -> np.uint32:
        popped = self._free.pop()
        if popped is None:
            folded: np.uint32 = folded_number(np.array([series]))[0]
            return folded
        number: np.uint32 = popped[0]
        self._free.push(popped[1:])
        entry = self._ledger.upto(int(number) + 1)[number : number + 1]
        entry["series"] = series.tobytes()
        if self._numbers.put_new(series, number):
            return number
        entry["series"] = NO_SERIES  # f
        self._free.push(popped[:1])
        return self._number_of(series)

    def _number_of(self, series: np.void) -> np.uint32:
        """Return the number that the map has for a series; 0: none."""
        value = np.zeros(1, np.uint32)
        self._numbers.look_up(series, value)
        found: np.uint32 = value[0]
        return found

    # Corrections

    def record_seeds(self, numbers: Numbers, *, pre_existing: bool) -> None:
        """Add pre-existing connections, or those whose opening was missed."""
        self._add("pre_existing" if pre_existing else "opened", numbers, 1)

    def record_closed(self, words: Words, now_ns: int) -> None:
        """Add connections whose closing was missed; their lifetimes are upper bounds."""
        numbers = numbers_of(words)
        self._add("closed", numbers, 1)
        if len(self._bounds):
            times = words >> np.uint64(SERIES_BITS)
            lifetimes = np.uint64(now_ns >> TIME_SHIFT) - times
            corrections = self._corrections_of(numbers)
            np.add.at(corrections["lifetimes_sum"], numbers, lifetimes)
            buckets = np.searchsorted(self._bounds, lifetimes)
            np.add.at(corrections["lifetimes"], (numbers, buckets), np.uint64(1))

    def adopt(self, old: Ledger) -> None:
        """Continue the counters of the previous run, whose connections were added before.

        Both programs have counted what happened since this one was attached. So what it has
        counted is subtracted from what the old one has: no event counts twice. For each
        series, pre-existing connections become those of the old run, and opened and closed
        are raised, by the same number, until neither is lower than in the old run.

        Args:
            old: read before this call, and after the connections were added.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        is_used = (old.opened | old.closed | old.failed | old.pre_existing) != 0
        # Several series have one number if they are folded.
        numbers, place = np.unique(self.numbers(old.series[is_used]), return_inverse=True)
        before = self.ledger()

        def missing(name: str) -> npt.NDArray[np.int64]:
            rows = getattr(old, name)[is_used]
            total = np.zeros((len(numbers), *rows.shape[1:]), np.int64)
            if rows.size:
                np.add.at(total, place, rows)
            difference: npt.NDArray[np.int64] = total - getattr(before, name)[numbers]
            return difference

        pre_existing, lifetimes = missing("pre_existing"), missing("lifetimes")
        opened = np.maximum(missing("opened"), missing("closed") - pre_existing)
        closed = opened + pre_existing
        if lifetimes.size:
            # The buckets must add up to `closed`. Closings whose lifetimes are unknown go
            # into the first one.
            lifetimes[:, 0] += closed - lifetimes.sum(axis=1)
        self._add("pre_existing", numbers, pre_existing)
        self._add("opened", numbers, opened)
        self._add("closed", numbers, closed)
        self._add("failed", numbers, np.maximum(missing("failed"), 0))
        if lifetimes.size:
            self._add("lifetimes_sum", numbers, missing("lifetimes_sum"))
            self._add("lifetimes", numbers, lifetimes)

    @map_errors()
    def _add(
        self, field: str, numbers: Numbers, change: "npt.NDArray[np.int64] | int"
    ) -> None:
        """Correct a field of some numbers, which may repeat."""
        corrections = self._corrections_of(numbers)
        # A negative change wraps around; so does the sum, back to the right value.
        np.add.at(corrections[field], numbers, np.asarray(change, np.int64).view(np.uint64))

    def _corrections_of(self, numbers: Numbers) -> "npt.NDArray[np.void]":
        """Return the corrections of all numbers from 0 to the highest of these at least."""
        return self._corrections.upto(int(numbers.max(initial=0)) + 1)

    # Freeing

    def reclaim(self, connections: Callable[[], Iterator[Words]]) -> None:
        """Free numbers without connections: forgotten ones, or all if few are free.

        Args:
            connections: returns the words of all slots.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        series = self._entries()["series"].copy()
        series[:SERIES_FIRST] = NO_SERIES
        with self._forgotten.restored_on_failure():
            is_forgotten = self._forgotten.take(series)
            is_used = series != NO_SERIES
            is_full = np.count_nonzero(is_used) > FULL_SHARE * self.max_series
            is_wanted = is_used & (is_forgotten | is_full)
            if not is_wanted.any():
                return
            is_wanted &= ~_referred_to(connections)[: len(series)]
            for chosen, keep in ((is_forgotten, False), (~is_forgotten, True)):
                numbers = np.flatnonzero(is_wanted & chosen).astype(np.uint32)
                self.free(numbers, connections, keep_counters=keep)

    def free(
        self,
        numbers: Numbers,
        connections: Callable[[], Iterator[Words]],
        *,
        keep_counters: bool = False,
    ) -> None:
        """Free numbers, as the module's docstring argues.

        Args:
            numbers: without duplicates.
            connections: as for `reclaim`.
            keep_counters: whether the folded series get their counters.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if not len(numbers):
            return
        entries = self._entries()
        with map_errors():
            own = [self._number_of(each) for each in _keys(entries["series"][numbers])]
        is_own = np.array(own, np.uint32) == numbers
        # A run may be about to push a number that is neither: f.
        is_known = is_own | is_in(numbers, [*self._orphans])
        numbers, is_own = numbers[is_known], is_own[is_known]
        series = entries["series"][numbers]
        with self._runs.without_caches():
            try:
                with map_errors():
                    self._numbers.delete_all(_keys(series[is_own]))
                self._runs.wait()
                is_referred_to = _referred_to(connections)[numbers]
                self._runs.wait()  # h
            except (TrackerError, MemoryError):  # g
                self._restore(numbers, series)
                raise
            self._restore(numbers[is_referred_to], series[is_referred_to])
        freed, freed_series = numbers[~is_referred_to], series[~is_referred_to]
        corrections = self._corrections.upto(len(entries))
        with map_errors():
            successors = np.array(
                [self._number_of(each) for each in _keys(freed_series)], np.uint32
            )  # c
            if keep_counters:
                folded = folded_number(freed_series)
                successors = np.where(successors == 0, folded, successors)
            with self._moving:
                _move(entries, corrections, freed, successors)
            self._orphans.difference_update(freed.tolist())
            self._free.push(np.sort(freed))

    def _restore(self, numbers: Numbers, series: Series) -> None:
        for number, each in zip(numbers, _keys(series), strict=True):
            try:
                is_restored = self._numbers.put_new(each, number)
                is_restored = is_restored or self._number_of(each) == number
            except OSError:
                is_restored = False
            if is_restored:
                self._orphans.discard(int(number))
            else:  # d; or the kernel refuses it
                self._orphans.add(int(number))


def _referred_to(connections: Callable[[], Iterator[Words]]) -> npt.NDArray[np.bool_]:
    """Return for each of 2^18 numbers whether a connection has it."""
    found = np.zeros(1 << SERIES_BITS, np.bool_)
    for words in connections():
        found[words & np.uint64(SERIES_MASK)] = True
    return found


def _in_use(entries: "npt.NDArray[np.void]") -> npt.NDArray[np.bool_]:
    """Return which entries have a series: its IP version is never 0."""
    used: npt.NDArray[np.bool_] = entries["series"].view(SERIES)["ip_version"] != 0
    return used


def _keys(series: Series) -> "npt.NDArray[np.void]":
    """Return series as keys of a map."""
    keys: npt.NDArray[np.void] = np.ascontiguousarray(series).view(SERIES)
    return keys


def _window(entry_bytes: int) -> int:
    """Return the least number of entries, from `WINDOW` on, that fill whole pages."""
    step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, entry_bytes)
    return -(-WINDOW // step) * step


def _move(
    entries: "npt.NDArray[np.void]",
    corrections: "npt.NDArray[np.void]",
    numbers: Numbers,
    successors: Numbers,
) -> None:
    """Clear the entries of numbers, and add each to that of its successor, if not 0."""
    has_one = successors != 0
    moved, to = numbers[has_one], successors[has_one]
    for name in corrections.dtype.names or ():
        counted = corrections[name][moved]
        if name in (entries.dtype.names or ()):
            counted = counted + entries[name][moved]
        np.add.at(corrections[name], to, counted)
    for each in (entries, corrections):
        each[numbers] = np.zeros(1, each.dtype)


def ledger_of(
    entries: "npt.NDArray[np.void]", corrections: "npt.NDArray[np.void]"
) -> Ledger:
    """Return the sums of what the program has counted and of its corrections.

    Args:
        entries: of `entry_dtype`.
        corrections: of `correction_dtype`.
    """

    def total(name: str) -> npt.NDArray[np.int64]:
        both: npt.NDArray[np.int64] = (entries[name] + corrections[name]).view(np.int64)
        return both

    size = len(entries)
    has_lifetimes = "lifetimes" in (entries.dtype.names or ())
    return Ledger(
        series=entries["series"].copy(),
        opened=total("opened"),
        closed=total("closed"),
        failed=total("failed"),
        pre_existing=corrections["pre_existing"].astype(np.int64),
        lifetimes_sum=total("lifetimes_sum") if has_lifetimes else np.zeros(size, np.int64),
        lifetimes=total("lifetimes") if has_lifetimes else np.zeros((size, 0), np.int64),
    )
