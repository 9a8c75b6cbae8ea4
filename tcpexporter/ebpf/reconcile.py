# SPDX-License-Identifier: GPL-3.0-only
"""What differs between the tracker and the socket tables, and which of them is right.

The tables are right about what is established, and cannot be read at one
moment. The tracker has the times, and can miss events. Connections open and
close all the while, so no single difference proves anything.

A connection is known to the tracker by its socket if the program was told that
it opened, and is a seed if it came from the tables, which know its key alone. Of
several with the same key the tables say how many there are; what is too much is
a seed before it is one with the kernel's time, and an older one before a newer.

Adding seeds
------------
The program is attached already, and notes from now on whatever closes. Then

1. a look at the tables, and then one at the tracker, show what only the tables have;
2. that becomes seeds, for the program to find when they close;
3. those of them are taken out that the program has noted.

For a connection, against those steps:

a. Open before the program was attached, and still open after 3: a seed from 2 on.
   Only the kernel takes it out, when it closes.
b. Opened before the look of 1 while the program was attached: the kernel tells of an
   opening before it stores the new state, so the tracker has what the tables show, and
   is looked at later. It is no seed.
c. Opened after that look: the tracker has it with the kernel's time. Nothing here
   touches what the program was told of, so no timestamp of the kernel's is ever lost.
d. Seen by 1, whether the program knew it or not, and closed before 2: it looks as if
   only the tables had it. The program has noted it, and 3 takes it out.
e. As d, but while 2 is under way: the program notes it before it looks for a seed. Either
   it finds that, or the seed was added later, and 3 comes later still.
f. As d or e, and its address pair opened anew at any time: the tracker has the new one,
   by its socket; 3 takes out the seed, which is the old one.
g. Closed after 2: the program finds the seed and notes it, too. Whatever has its slot
   by the time of 3 has another time, and stays.
h. As d, but the kernel did not run the program, or there was no room for the note: the
   kernel and the program count that, which is a reason to reconcile: l or r.

The kernel reports a change just before it stores the new state. Softirqs do both without
being preempted, and steps 1 and `reconcile` begin when all of these have ended
(`Tracker.wait_for_runs`). A task can be preempted between the two. A closing that was
reported before the recording began, and that 1 shows as established all the same, becomes
a seed until the next reconciliation: s.

Reconciling
-----------
`reconcile` looks at the tables, reads the tracker, and does both again if they
differ. Only what differs in the same way both times is corrected:

i. Open, and its opening was missed: both looks show it and the tracker never
   has it. It is added as a seed, as above.
j. Opened before the first look, closed before the tracker was read: it looks
   like i. The second look does not show it.
k. As j, but opened anew before the second look and closed again before the
   tracker was read again: that was noted; it is added, and 3 takes it out.
l. Closed, and its closing was missed: neither look shows it and the tracker
   has the same entry, of the same time, both times. It is removed. If the socket's
   address is used again before that, the program itself finds out.
m. Opened after the first look had passed its place: the tracker has it, the look
   does not. Its time is after the first look began, so it is not judged.
n. The kernel tells of an opening just before it stores the state: the entry is
   there and a look does not show it. The second look comes later and does.
o. Of a network namespace that the tables do not cover, as it is newer than the
   exporter: it is not judged.
p. Open, and hidden from the first look by its neighbours (see
   `SocketTables.established`): the second shows it.
q. As l, but opened anew, with word of it, before it is removed: by another socket,
   it has another slot; by one at the same address, `Tracker.release` finds another
   time and lets it be.
r. As l, and opened anew with the same key on another socket: the tracker has two of
   that key and the tables show one. The older one is removed.

s. A task was preempted between the report of a change and its store for longer than both
   looks took. Reported: the correction is wrong, and the next run corrects it. Missed (on
   Linux 7): the tables and the tracker agree, and differ when the state is stored.
t. Open, its opening was missed, and its socket's address is that of a connection whose
   closing was missed: the tracker has that one under the socket's handle. As i and l. If it
   closes in between, the program sees another key and removes both.

So a correction can be wrong only if two looks in a row miss the same connection
(n or p, twice), or as s. The next run then finds it as i, with a lower age. Therefore a run
is made again, as soon as its share of CPU allows, until one has found nothing and no event
was missed since the run before it; see `schedule.Schedule`.
"""

import logging
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import Hashes, hashes
from tcpexporter.connections.record import Records
from tcpexporter.connections.source import ConnectionTables, Reconciliation
from tcpexporter.ebpf.connection_array import Known
from tcpexporter.ebpf.schedule import Schedule, Signs
from tcpexporter.ebpf.slot_ranges import Slots
from tcpexporter.errors import enough_memory
from tcpexporter.host.background import Task

log = logging.getLogger(__name__)


class TrackedConnections(Protocol):
    """The connections that the BPF program and seeding have recorded: see `Tracker`."""

    restored: int

    def known(self) -> Known: ...
    def add(self, seeds: Records) -> Slots: ...
    def recording_closings(self) -> AbstractContextManager[None]: ...
    def release_closed(self, slots: Slots) -> int: ...
    def release(self, slots: Slots, established_ns: npt.NDArray[np.uint64]) -> int: ...
    def reclaim(self) -> None: ...
    def wait_for_runs(self) -> None: ...
    def events(self) -> dict[str, int]: ...
    def missed_events(self) -> int: ...
    def unrecorded_closings(self) -> int: ...


WATCH_S = 1.0
"""How often the kernel is asked whether events were missed."""


LIMIT_S = 300.0
"""For a comparison, which a host that is short of CPU may take a minute for."""

STOP_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class Corrections:
    """How many connections were corrected."""

    missed_open: int = 0
    missed_close: int = 0


NOTHING = Corrections()


@dataclass(frozen=True)
class _Differences:
    missing: Records
    """What only the tables have, of dtype `SOCKET`."""
    gone: Known
    """What only the tracker has."""


def seed(tracker: TrackedConnections, tables: ConnectionTables) -> None:
    """Add the connections that are older than the tracker, which is attached already.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    with tracker.recording_closings():
        _add(tracker, _differences(tracker, tables, boottime_ns(), with_ages=True).missing)


def reconcile(tracker: TrackedConnections, tables: ConnectionTables) -> Corrections:
    """Make the tracker agree with the socket tables, in what is certain.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    tracker.wait_for_runs()
    began_ns = boottime_ns()
    once = _differences(tracker, tables, began_ns)
    if not len(once.missing) and not len(once.gone.slots):
        return NOTHING
    with tracker.recording_closings():
        again = _differences(tracker, tables, began_ns, with_ages=True)
        is_missing = np.isin(hashes(again.missing["key"]), hashes(once.missing["key"]))
        added = _add(tracker, again.missing[is_missing])
    gone = once.gone.only(np.isin(once.gone.slots, again.gone.slots))
    # One that is new in its slot has another time, and stays.
    removed = tracker.release(gone.slots, gone.established_ns)
    return Corrections(missed_open=added, missed_close=removed)


def _differences(
    tracker: TrackedConnections,
    tables: ConnectionTables,
    before_ns: int,
    *,
    with_ages: bool = False,
) -> _Differences:
    """After one look at each; gone is only what is older than ``before_ns``."""
    established = tables.established(with_ages=with_ages)
    known = tracker.known()
    found = hashes(established["key"])
    missing = established[_surplus(found, known.hashes)]
    is_judged = np.isin(known.netns, tables.namespaces())  # o
    judged = known.only(is_judged & (known.established_ns < before_ns))  # m
    worth = np.where(judged.is_seed, np.uint64(0), judged.established_ns)
    return _Differences(missing, judged.only(_surplus(judged.hashes, found, worth)))


def _surplus(
    some: Hashes, others: Hashes, worth: npt.NDArray[np.uint64] | None = None
) -> npt.NDArray[np.bool_]:
    """Which of ``some`` are more than ``others`` has of the same; those worth least."""
    order = np.argsort(some) if worth is None else np.lexsort((~worth, some))
    ordered = some[order]
    among = np.sort(others)
    number = np.arange(len(some)) - np.searchsorted(ordered, ordered)
    there = np.searchsorted(among, ordered, "right") - np.searchsorted(among, ordered)
    is_surplus = np.empty(len(some), np.bool_)
    is_surplus[order] = number >= there
    return is_surplus


def _add(tracker: TrackedConnections, seeds: Records) -> int:
    """Steps 2 and 3; how many of the seeds stay."""
    slots = tracker.add(seeds)
    return len(slots) - tracker.release_closed(slots)


class Reconciler:
    """Reconciles in a thread, when its `Schedule` says so."""

    def __init__(
        self,
        tracker: TrackedConnections,
        tables: ConnectionTables,
        *,
        interval_s: float,
        cpu_share: float,
    ) -> None:
        """Prepare to reconcile; `start` begins.

        Args:
            tracker: what is corrected.
            tables: what it is compared with, from the thread.
            interval_s: between two runs; 0: only when events were missed.
            cpu_share: of one core, how much it may use on average. What it used is
                waited for until it is no more than that, whatever the reason to run.
        """
        self.state = Reconciliation(interval_s=interval_s)
        self._tracker = tracker
        self._tables = tables
        self._interval_s = interval_s
        self._cpu_share = cpu_share
        self._compared = Signs().trouble
        """What had been missed when the last run that ended began."""
        self.task = Task(
            "reconcile",
            self._watch,
            without="reconciliation failed",
            limit_s=LIMIT_S,
        )

    def start(self) -> None:
        """Watch from now on.

        Raises:
            ThreadError: there can be no thread.
        """
        self.task.begin()

    def close(self) -> None:
        """End the thread; a run that takes too long to wait for ends with the process."""
        self.task.stop(STOP_TIMEOUT_S)

    def trouble(self) -> str | None:
        """Why the tracker is wrong and stays so; None: it is right, or will be soon.

        While the thread fails or hangs, the tracker is right until an event is missed.

        Raises:
            TrackerError: the kernel refuses to tell.
        """
        trouble = self.task.trouble()
        if trouble and self._signs().trouble != self._compared:
            return f"events were missed, and reconciliation failed: {trouble}"
        return None

    def _watch(self) -> None:
        schedule = Schedule(interval_s=self._interval_s, now_s=time.monotonic())
        while not self.task.wait(WATCH_S):
            try:
                with enough_memory():
                    if self._look(schedule):
                        self.task.works()
            except Exception as error:
                self.task.failed(error)
                schedule.failed(time.monotonic())

    def _look(self, schedule: Schedule) -> bool:
        """Reclaim slots, and reconcile if that is due; returns whether it was."""
        self._tracker.reclaim()
        signs = self._signs()
        began_s = time.monotonic()
        if not schedule.is_due(signs, began_s):
            return False
        found_nothing, rest_s = True, 0.0
        if schedule.is_needless(signs):
            self.state = replace(self.state, finished_s=time.time())
        else:
            corrections, rest_s = self._run()
            found_nothing = corrections == NOTHING
        schedule.ended(
            signs,
            found_nothing=found_nothing,
            rest_s=rest_s,
            began_s=began_s,
            now_s=time.monotonic(),
        )
        return True

    def _signs(self) -> Signs:
        missed = self._tracker.missed_events()
        events = self._tracker.events()
        refused = events.pop("refused")
        trouble = (
            missed + refused + self._tracker.unrecorded_closings() + self._tracker.restored
        )
        return Signs(trouble, sum(events.values()))

    def _run(self) -> tuple[Corrections, float]:
        """Reconcile once; returns for how many seconds that has used its share of CPU."""
        began_s = time.monotonic()
        began_cpu_s = time.thread_time()
        missed = self._signs().trouble
        corrections = reconcile(self._tracker, self._tables)
        self._compared = missed
        rest_s = (time.thread_time() - began_cpu_s) / self._cpu_share
        self.state = replace(
            self.state,
            runs=self.state.runs + 1,
            missed_open=self.state.missed_open + corrections.missed_open,
            missed_close=self.state.missed_close + corrections.missed_close,
            duration_s=time.monotonic() - began_s,
            finished_s=time.time(),
            interval_s=max(self._interval_s, rest_s) if self._interval_s else 0.0,
        )
        if corrections != NOTHING:
            log.debug("corrected: %s", corrections)
        return corrections, rest_s
