# SPDX-License-Identifier: GPL-3.0-only
"""Compares the tracker with the socket tables and corrects the tracker.

The tables have exactly the established connections, but reading them takes time. The
tracker has the times of connections, but it can miss events. Connections open and close
meanwhile, so a single difference does not prove that the tracker is wrong.

If the BPF program has seen a connection open, the tracker identifies it by its socket. A
connection from the tables is a *seed*: the tracker identifies it by its key alone, because
the tables do not show the socket's address. The tables show how many connections have the
same key. If the tracker has more of them, the surplus is removed. Seeds are removed before
connections that the kernel reported, and older connections before newer ones.

Adding seeds
------------
The program is already attached. From now on it records each closing in the closings log.
Three steps follow:

1. dump the socket tables, and then read the tracker, to find the connections that only the
   tables have;
2. add these connections as seeds, which the program finds when they close;
3. remove the seeds that the closings log has.

A start does 1 and 2 for one part of the dump after the other, while a thread reads the next
part. In these cases, the dump is then the part that shows the connection:

a. Open before the program was attached, and still open after 3: a seed from 2 on. Only the
   program removes it, when it closes.
b. Opened before the dump of 1 while the program was attached. The kernel reports an opening
   before it stores the new state, and the tracker is read after the tables. So the tracker
   has the connection too, and it does not become a seed.
   If another part shows a pre-existing connection with the same key on another device, it
   does not become a seed either: the next reconciliation adds it as in i.
c. Opened after that dump: the tracker has it with the kernel's time. No step changes a
   connection that the kernel reported, so no time of the kernel is ever lost.
d. In the dump of 1, and closed before 2: the dump shows it and the tracker does not, so it
   becomes a seed. The program has recorded the closing, and 3 removes the seed.
e. As d, but it closes during 2: the program records the closing before it looks for a seed.
   If its run does not find the seed, the run began before the seed was added. So 3 waits
   for these runs, and reads the log again. Before it waits, it adds the seeds to the
   ledger: a scrape must not show connections that are not counted as opened.
f. As d or e, and the same address pair opens again at any time: the tracker has the new
   connection by its socket; 3 removes the seed, which is the old connection.
g. Closed after 2: the program finds and removes the seed, and records the closing too. The
   slot keeps the handle of the seed until 3 frees it, so no other connection gets it.
h. As d, but the kernel skipped the program, or the closings log was full. The kernel or the
   program counts that. A reconciliation follows, with case l or r.

The kernel reports a change just before it stores the new state. A softirq does both without
being preempted. Step 1 and `reconcile` begin when every softirq that was running has ended
(`Runs.wait`). A task, however, can be preempted between the report and the
store. If it reported a closing before the recording began, and the dump of 1 still shows
the connection, the connection becomes a seed. The next reconciliation removes it: case s.

For the order of loads and stores, see the cases 10, 11 and 13 of `memory_order`.

Reconciling
-----------
`reconcile` dumps the tables and reads the tracker. If they differ, it does both again. It
corrects a connection only if the difference is the same both times. When a start adopts
pinned connections, a thread does the first dump during the adoption (`begin_dump`). The
tracker is read when the dump and the adoption have ended. These are the cases:

i. Open, and its opening was missed: both dumps show it, and the tracker does not have it.
   Steps 2 and 3 add it as a seed.
j. Opened before the first dump, closed before the tracker was read: it looks like i. The
   second dump does not show it.
k. As j, but opened again before the second dump, and closed again before the tracker was
   read again: the program recorded that closing; 2 adds the connection, and 3 removes it.
l. Closed, and its closing was missed: neither dump shows it, and the tracker has the same
   entry, with the same time, both times. It is removed. If a new socket gets the same
   address before that, the program itself corrects the entry.
m. Opened after the first dump had begun, and that dump does not show it: only the tracker
   has it. Its time is after the start of that dump, so it is not compared.
n. The first dump falls between the report of an opening and the store of the state: only
   the tracker has the connection. The second dump comes later and shows it.
o. In a network namespace that the tables do not cover, because the namespace is newer than
   the exporter: it is not compared.
p. Open, and hidden from the first dump by other connections of its hash bucket (see
   `SocketTables.established`): the second dump shows it.
q. As l, but opened again, with an event, before it is removed. On another socket, it has
   another slot. On the socket at the same address, `Tracker.release` finds another time and
   keeps it.
r. As l, and opened again with the same key on another socket: the tracker has two
   connections with that key, and the tables show one. The older one is removed.

s. A task was preempted between the report of a change and its store, for longer than both
   dumps took. If the program got the event, the correction is wrong, and the next run
   corrects it. If the program missed the event (on Linux 7), tables and tracker agree at
   first, and differ when the state is stored.
t. Open, its opening was missed, and its socket's address is that of a connection whose
   closing was missed. The tracker has the old connection under the handle of this socket.
   Cases i and l correct both. If the new connection closes before that, the program finds
   another key in the slot, and removes both.

So a correction can be wrong only if two dumps in a row miss the same connection (n or p,
twice), or in case s. Then the next run adds the connection again as in case i, with a lower
age. Therefore another run follows each correction, as soon as the CPU share allows. The
runs end when a run has found nothing and no event was missed since the run before it: see
`schedule.Schedule`.
"""

import contextlib
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import Hashes, hashes
from tcpexporter.connections.record import Records, Words
from tcpexporter.connections.sets import is_in
from tcpexporter.connections.source import ConnectionTables
from tcpexporter.ebpf.connection_array import Known
from tcpexporter.ebpf.event_counters import Events
from tcpexporter.ebpf.free_numbers import Slots
from tcpexporter.host.background import ahead, in_thread


class ProgramRuns(Protocol):
    """The member of `Runs` that reconciling requires."""

    def wait(self) -> None: ...


class TrackedConnections(Protocol):
    """The members of a tracker that reconciling requires; `Tracker` documents each of them.

    Every method raises TrackerError if the kernel refuses a map operation.
    """

    restored: int
    seeds_refused: int

    @property
    def runs(self) -> ProgramRuns: ...
    def known(self, *, with_seeds: bool = True) -> Known: ...
    def add(self, seeds: Records) -> Slots: ...
    def recording_closings(self) -> AbstractContextManager[None]: ...
    def release_closed(self, slots: Slots, *, pre_existing: bool = False) -> int: ...
    def release(self, slots: Slots, words: Words) -> int: ...
    def reclaim(self) -> None: ...
    def events(self) -> Events: ...


@dataclass(frozen=True)
class Corrections:
    """The numbers of connections that a run corrected."""

    missed_open: int = 0
    """Added, because their opening was missed."""
    missed_close: int = 0
    """Removed, because their closing was missed."""
    refused: int = 0
    """Not added, because the tracker is full."""


NOTHING = Corrections()


class Dump(NamedTuple):
    """The connections of one dump of the socket tables."""

    began_ns: int
    """When this dump began, on CLOCK_BOOTTIME; for the second dump of a run, when the first
    one began."""
    hashes: Hashes
    """Of the keys of the connections."""


class Comparison(NamedTuple):
    """A dump, and how it differs from the tracker."""

    dump: Dump
    is_missing: npt.NDArray[np.bool_]
    """Which connections of the dump the tracker does not have."""
    gone: Known
    """The connections that only the tracker has."""


def seed(tracker: TrackedConnections, tables: ConnectionTables) -> None:
    """Add the pre-existing connections to a tracker whose program is already attached.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """

    def whole() -> Generator[Records, None, None]:
        yield tables.established(with_ages=True)

    seed_in_batches(tracker, whole())


def seed_in_batches(
    tracker: TrackedConnections, batches: Generator[Records, None, None]
) -> None:
    """Add the connections as `seed` does, while a thread reads the next batch.

    Args:
        tracker: a tracker whose program is already attached.
        batches: reads the tables, of dtype `SOCKET`. A batch is read when the iterator is
            advanced to it.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
        ThreadError: the kernel refuses another thread.
    """
    with tracker.recording_closings(), contextlib.closing(ahead(batches)) as following:
        added = [np.empty(0, np.uint32)]
        for batch in following:
            reported = tracker.known(with_seeds=False)
            missing = batch
            if len(reported.slots):  # otherwise, hashing would take a fifth of the time
                missing = batch[_surplus(hashes(batch["key"]), reported.hashes)]
            added.append(tracker.add(missing))
        tracker.release_closed(np.concatenate(added), pre_existing=True)


def begin_dump(
    tracker: TrackedConnections, batches: Generator[Records, None, None]
) -> "Future[Dump]":
    """Start a thread that does the first dump of `reconcile`.

    Args:
        tracker: a tracker whose program is already attached.
        batches: reads the tables, of dtype `SOCKET`.

    Raises:
        TrackerError: the kernel refuses a map operation.
        ThreadError: the kernel refuses another thread.
    """
    tracker.runs.wait()
    began_ns = boottime_ns()

    def dump() -> Dump:
        with contextlib.closing(batches):
            found = [np.empty(0, np.uint64), *(hashes(each["key"]) for each in batches)]
        return Dump(began_ns, np.concatenate(found))

    return in_thread("dump", dump)


def reconcile(
    tracker: TrackedConnections,
    tables: ConnectionTables,
    *,
    pre_existing: bool = False,
    first: Comparison | None = None,
) -> Corrections:
    """Correct the tracker where two comparisons show the same difference to the tables.

    Args:
        tracker: the tracker to correct.
        tables: the socket tables.
        pre_existing: whether added connections count as pre-existing, because this is the
            first comparison after a start; otherwise they count as opened.
        first: the first comparison, if it was done before.

    Returns:
        The numbers of connections that were added, removed and refused.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    if first is None:
        tracker.runs.wait()
        began_ns = boottime_ns()
        found = hashes(tables.established(with_ages=False)["key"])
        first = compare(tracker, tables, Dump(began_ns, found))
    if not first.is_missing.any() and not len(first.gone.slots):
        return NOTHING
    refused = tracker.seeds_refused
    with tracker.recording_closings():
        established = tables.established(with_ages=True)
        dump = Dump(first.dump.began_ns, hashes(established["key"]))
        second = compare(tracker, tables, dump)
        is_missing = second.is_missing & is_in(
            dump.hashes, first.dump.hashes[first.is_missing]
        )
        added = _add(tracker, established[is_missing], pre_existing=pre_existing)
    gone = first.gone.only(is_in(first.gone.slots, second.gone.slots))
    # A new connection in the same slot has another time, and stays.
    removed = tracker.release(gone.slots, gone.words)
    return Corrections(added, removed, tracker.seeds_refused - refused)


def compare(
    tracker: TrackedConnections, tables: ConnectionTables, dump: Dump
) -> Comparison:
    """Compare a dump with the present tracker.

    A connection of the tracker is compared only if it was established before ``began_ns``
    of the dump.

    Raises:
        TrackerError: the kernel refuses a map operation.
    """
    known = tracker.known()
    is_missing = _surplus(dump.hashes, known.hashes)
    is_judged = is_in(known.netns, tables.namespaces())  # o
    judged = known.only(is_judged & (known.established_ns < dump.began_ns))  # m
    precedence = np.where(judged.is_seed, np.uint64(0), judged.established_ns)
    is_gone = _surplus(judged.hashes, dump.hashes, precedence)
    return Comparison(dump, is_missing, judged.only(is_gone))


def _surplus(
    some: Hashes, others: Hashes, precedence: npt.NDArray[np.uint64] | None = None
) -> npt.NDArray[np.bool_]:
    """Return which elements ``some`` has more often than ``others``.

    Among equal elements, those with the lowest precedence are the surplus.
    """
    if not len(others):  # a first start: sorting would take a tenth of a second
        return np.ones(len(some), np.bool_)
    order = np.argsort(some) if precedence is None else np.lexsort((~precedence, some))
    ordered = some[order]
    among = np.sort(others)
    number = np.arange(len(some)) - np.searchsorted(ordered, ordered)
    there = np.searchsorted(among, ordered, "right") - np.searchsorted(among, ordered)
    is_surplus = np.empty(len(some), np.bool_)
    is_surplus[order] = number >= there
    return is_surplus


def _add(tracker: TrackedConnections, seeds: Records, *, pre_existing: bool = False) -> int:
    """Do the steps 2 and 3 for seeds of dtype `SOCKET`; return how many of them stay."""
    slots = tracker.add(seeds)
    return len(slots) - tracker.release_closed(slots, pre_existing=pre_existing)
