# SPDX-License-Identifier: GPL-3.0-only
"""What differs between the tracker and the socket tables, and which of them is right.

The tables are right about what is established, and cannot be read at one
moment. The tracker has the times, and can miss events. Connections open and
close all the while, so no single difference proves anything.

Seeding
-------
The program is attached before the tables are read. Then `seed`

1. looks at the tables: what is established becomes a seed, in one bulk update;
2. takes out of the seeds what the tracepoint has told of (in `Tracker.add_seeds`);
3. looks again: a seed that is not there any more is doubtful;
4. looks once more if there are doubtful seeds, and takes out those that are not
   there again.

For a connection, against those steps:

a. Open before the program was attached, and still open after 4: a seed from 1
   on. Only the kernel takes it out, when it closes.
b. Opened before 1 while the program was attached: in ``tracked`` with the
   kernel's timestamp, and a seed by 1. Step 2 removes the seed.
c. Opened after 1: in ``tracked`` alone. Nothing here touches that map, so no
   timestamp of the kernel's is ever lost.
d. Seen by 1, closed before it became a seed: the kernel found no seed to take
   out. It is in neither look at 3 and 4, and goes.
e. As d, and its address pair opened anew before 2: the kernel has told of the
   new one, so 2 removes the seed (b).
f. As d, and opened anew between 2 and 4: the kernel takes the stale seed out
   when it tells of the new one.
g. Closed after it became a seed: the kernel takes it out. If 4 does so as
   well, nothing is lost: what it names is not in the table.
h. Open all the time, but hidden from one look by its neighbours (see
   `SocketTables.established`): it is a seed if 1 saw it, and stays unless both
   3 and 4 miss it.

Removing a seed is right at any time after its connection has closed, and a
successor that the kernel tells of is never a seed, so no step has to be atomic
with another.

The kernel tells of a close just before it stores the new state, and a task can
be preempted between the two. A seed added in that window by 1, for a socket
that 3 still shows as established, stays until the next reconciliation.

Reconciling
-----------
`reconcile` looks at the tables, reads the tracker, and does both again if they
differ. Only what differs in the same way both times is corrected:

i. Open, and its opening was missed: both looks show it and the tracker never
   has it. It is added as a seed, by steps 1 to 4.
j. Opened before the first look, closed before the tracker was read: it looks
   like i. The second look does not show it.
k. As j, but opened anew before the second look and closed again before the
   tracker was read again: it is added, and step 4 takes it out.
l. Closed, and its closing was missed: neither look shows it and the tracker
   has the same entry, of the same time, both times. It is removed.
m. Opened after the first look had passed its place: the tracker has it, the look
   does not. Its time is after the first look began, so it is not judged.
n. The kernel tells of an opening just before it stores the state: the entry is
   there and a look does not show it. The second look comes later and does.
o. Of a network namespace that the tables do not cover, as it is newer than the
   exporter: it is not judged.
p. Open, and hidden from the first look by its neighbours: the second shows it.
q. As l, but opened anew, with word of it, before it is removed. What is removed
   from ``tracked`` is looked at as it is taken, in one step where the kernel has
   that; a newer entry goes back, as a seed with its own time, by steps 2 to 4.

So a correction can be wrong only if two looks in a row miss the same connection
(n or p, twice). The next reconciliation then finds it as i, with a lower age.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections import Records, contains, locate
from tcpexporter.errors import SourceError
from tcpexporter.sources import Reconciliation
from tcpexporter.tracker import Tracker

log = logging.getLogger(__name__)


class Tables(Protocol):
    """The socket tables to look at, as `SocketTables` gives them."""

    def established(self) -> Records:
        """What is established, of dtype `CONNECTION`."""
        ...

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """The inodes of the network namespaces that they cover."""
        ...


WATCH_S = 1.0
"""How often the kernel is asked whether events were missed."""


STOP_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class Corrections:
    """How many connections were corrected."""

    missed_open: int = 0
    missed_close: int = 0


NOTHING = Corrections()


def seed(tracker: Tracker, tables: Tables) -> int:
    """Add the connections that are older than the tracker, which is attached already.

    Returns:
        How many found no room.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    return _add(tracker, tables.established(), tables)


def reconcile(tracker: Tracker, tables: Tables) -> Corrections:
    """Make the tracker agree with the socket tables, in what is certain.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    began_ns = boottime_ns()
    missing, gone = _differences(tracker, tables)
    gone = gone[gone["value"]["established_ns"] < began_ns]  # m
    if not len(missing) and not len(gone):
        return NOTHING
    still_missing, still_gone = _differences(tracker, tables)
    missing = missing[contains(missing["key"], still_missing["key"])]
    gone = gone[_same(gone, still_gone)]
    refused = _add(tracker, missing, tables) if len(missing) else 0
    if len(gone):
        _remove(tracker, gone, tables)
    return Corrections(missed_open=len(missing) - refused, missed_close=len(gone))


def _differences(tracker: Tracker, tables: Tables) -> tuple[Records, Records]:
    """What only the tables have, and what only the tracker has."""
    established = tables.established()
    known = np.concatenate([chunk.copy() for chunk in tracker.read()])
    missing = established[~contains(established["key"], known["key"])]
    gone = known[~contains(known["key"], established["key"])]
    return missing, gone[np.isin(gone["key"]["netns"], tables.namespaces())]  # o


def _same(before: Records, now: Records) -> npt.NDArray[np.bool_]:
    """Which entries of ``before`` are in ``now`` with the same key and time."""
    place = locate(before["key"], now["key"])
    is_there = place >= 0
    if len(now):
        is_there &= (
            now["value"]["established_ns"][place] == before["value"]["established_ns"]
        )
    return is_there


def _add(tracker: Tracker, seeds: Records, tables: Tables) -> int:
    """Steps 2 to 4; returns how many seeds found no room."""
    refused = tracker.add_seeds(seeds)
    doubtful = seeds["key"]
    for _ in range(2):
        doubtful = doubtful[~contains(doubtful, tables.established()["key"])]
        if not len(doubtful):
            return refused
    tracker.remove_seeds(np.unique(doubtful))
    return refused


def _remove(tracker: Tracker, gone: Records, tables: Tables) -> None:
    tracker.remove_seeds(gone["key"])
    newer = tracker.remove_tracked(gone)
    if len(newer):
        _add(tracker, newer, tables)


class Reconciler:
    """Reconciles in a thread: at intervals, and when the kernel missed events.

    Where the kernel counts all that it missed, and since a run that found tables and
    tracker to agree it has neither missed an event nor told of one, they still do:
    then the next run is only noted, not made.
    """

    def __init__(
        self, tracker: Tracker, tables: Tables, *, interval_s: float, cpu_share: float
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
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reconcile", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; a run that takes too long to wait for ends with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _watch(self) -> None:
        failing = False
        seen = agreed = _Signs()
        finished_s = time.monotonic()
        rest_s = 0.0
        while not self._stop.wait(WATCH_S):
            try:
                signs = self._signs()
                waited_s = time.monotonic() - finished_s
                is_due = 0 < self._interval_s <= waited_s
                if waited_s < rest_s or (signs.trouble == seen.trouble and not is_due):
                    continue
                if signs == agreed and signs.tells_all:
                    self.state = replace(self.state, finished_s=time.time())
                else:
                    corrections, rest_s = self._run()
                    agreed = signs if corrections == NOTHING else _Signs()
                seen = signs
                failing = False
            except SourceError as error:
                if not failing:
                    log.warning("the numbers cannot be checked: %s", error)
                failing = True
            finished_s = time.monotonic()

    def _signs(self) -> "_Signs":
        missed = self._tracker.missed_events()
        events = self._tracker.events()
        refused = events.pop("refused")
        return _Signs((missed or 0) + refused, sum(events.values()), missed is not None)

    def _run(self) -> tuple[Corrections, float]:
        """Reconcile once; returns for how many seconds that has used its share of CPU."""
        began_s = time.monotonic()
        began_cpu_s = time.thread_time()
        corrections = reconcile(self._tracker, self._tables)
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


@dataclass(frozen=True)
class _Signs:
    """What the kernel counts; while nothing does, nothing can have changed."""

    trouble: int = 0
    """Events that were missed or that there was no room for."""
    changes: int = -1
    """Connections that the program added or removed."""
    tells_all: bool = False
    """Whether missed events are among the trouble."""
