# SPDX-License-Identifier: GPL-3.0-only
"""Each slot has one owner and none is lost, whatever the program and userspace do."""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tcpexporter.connections.record import CLOSED, SERIES_BITS, numbers
from tcpexporter.ebpf import reconcile
from tcpexporter.ebpf import tracker as tracker_module
from tcpexporter.ebpf.maps import Keys
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import TrackerError
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.in_process import (
    SLOTS,
    Dumps,
    all_connections,
    at_port,
    attach,
    free_slots,
    invented,
    slots_at,
    taken_slots,
    words_at,
)
from tests.kernel.helpers.worker import Worker
from tests.support import Peers, ss_established

PORTS = (10007, 10009)
CYCLES = 1_000_003
CHURNED = 10_009
"""Minimum number of cycles with real connections."""

SEEDS = 211

ONE_UNIT = np.uint64(1 << SERIES_BITS)
"""The difference of two words that have the same series and consecutive times."""


@pytest.fixture
def own_tracker(netns: str) -> Iterator[Tracker]:
    """A tracker and a namespace that only one test uses."""
    del netns
    attached = attach()
    yield attached
    attached.close()


def assert_each_has_one_owner(tracker: Tracker) -> None:
    """Check that each slot is either free or the value of exactly one handle."""
    everywhere = np.concatenate((free_slots(tracker), taken_slots(tracker)))
    assert sorted(everywhere.tolist()) == list(range(SLOTS))


def test_all_slots_are_free_at_first(own_tracker: Tracker) -> None:
    """All slots are on the stack of free slots, with the lowest on top."""
    assert free_slots(own_tracker).tolist() == list(range(SLOTS))
    assert_each_has_one_owner(own_tracker)


def test_a_closed_connection_keeps_its_slot_for_the_next_one(
    tracker: Tracker, peers: Peers
) -> None:
    """The kernel reuses addresses of sockets, so 2,018 sockets need far fewer slots."""
    for _ in range(1009):
        peers.connect(1)
        for each in peers.pairs.pop():
            each.close()
    assert len(taken_slots(tracker)) < 503
    assert len(all_connections(tracker)) == 0
    assert_each_has_one_owner(tracker)


def test_spare_slots_are_reclaimed(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots of closed connections are freed, and open connections keep theirs."""
    peers.connect(211)
    for client, server in peers.pairs[:199]:
        client.close()
        server.close()
    before = at_port(tracker, peers.port)
    tracker.reclaim()
    assert len(taken_slots(tracker)) >= 2 * 199
    monkeypatch.setattr(tracker_module, "SPARE_SLOTS", 0)
    tracker.reclaim()
    assert len(taken_slots(tracker)) < 2 * 12 + 53  # some slots are for other connections
    assert (at_port(tracker, peers.port) == before).all()
    assert_each_has_one_owner(tracker)


def test_refused_connections_are_added_later(tracker: Tracker) -> None:
    """While all slots are in use, openings are counted as refused, and no slot is lost."""
    slots = tracker.add(invented(SLOTS))
    assert len(slots) == SLOTS
    with Peers() as peers:
        peers.connect(7)
        assert tracker.events().refused == 14
        assert len(at_port(tracker, peers.port)) == 0
        assert tracker.release(slots, words_at(tracker, slots)) == SLOTS
        assert_each_has_one_owner(tracker)
        with Dumps() as dumps:
            assert reconcile.reconcile(tracker, dumps).missed_open == 14
        assert len(at_port(tracker, peers.port)) == 7
    assert_each_has_one_owner(tracker)


@pytest.mark.parametrize("step", ["deleted", "waited", "turned on"])
@pytest.mark.parametrize("ends", ["open", "closed", "reopened"])
def test_a_socket_used_during_a_release_keeps_its_connection(
    tracker: Tracker,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    ends: str,
) -> None:
    """h, g: The socket's address is used again between two steps of the release.

    After the last step, the program uses its caches again.
    """
    peers.connect(1)
    stale = slots_at(tracker, peers.port)
    words = words_at(tracker, stale)
    for each in peers.pairs.pop():
        each.close()
    hooks: dict[str, tuple[object, str]] = {
        "deleted": (tracker._handles, "delete_all"),
        "waited": (tracker.runs, "wait"),
        "turned on": (tracker.runs, "_begin_epoch"),
    }
    owner, name = hooks[step]
    real = getattr(owner, name)

    def then_use(*arguments: object) -> None:
        real(*arguments)
        for _ in range(23):
            peers.connect(1)
        if ends != "open":
            for client, server in peers.pairs:
                client.close()
                server.close()
            peers.pairs.clear()
        if ends == "reopened":
            peers.connect(23)

    monkeypatch.setattr(owner, name, then_use)
    assert tracker.release(stale, words) == 0
    monkeypatch.undo()
    expected = 0 if ends == "closed" else 23
    assert len(at_port(tracker, peers.port)) == expected
    assert ss_established(peers.port)["4"] == expected
    assert_each_has_one_owner(tracker)


@pytest.mark.parametrize("has_caches", [True, False], ids=["on", "off"])
def test_a_deleted_handle_is_found_only_in_a_cache(
    tracker: Tracker, peers: Peers, has_caches: bool
) -> None:
    """Sockets at the same addresses use their slots again, or get others.

    After the caches were off, they get others, too.
    """
    peers.connect(1)
    slots = slots_at(tracker, peers.port)
    for each in peers.pairs.pop():
        each.close()
    records, all_words = tracker._used()
    handles = records["handle"][slots]
    if has_caches:
        tracker._handles.delete_all(handles)
    else:
        with tracker.runs.without_caches():
            tracker._handles.delete_all(handles)
            tracker.runs.wait()
            peers.connect(97)
        assert (all_words[slots] == CLOSED).all()
    peers.connect(97)
    assert (all_words[slots] == CLOSED).all() != has_caches
    assert len(at_port(tracker, peers.port)) == len(peers.pairs)


def test_a_connection_that_opens_during_a_release_and_closes_after_it_is_not_lost(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h: The caches are off, so the program allocates another slot.

    The fault: an opening found the slot in a cache, and the closing did not.
    """
    peers.connect(1)
    stale = slots_at(tracker, peers.port)
    for each in peers.pairs.pop():
        each.close()
    delete, begin = tracker._handles.delete_all, tracker.runs._begin_epoch

    def delete_and_open(handles: Keys) -> None:
        delete(handles)
        peers.connect(97)

    def begin_and_close() -> None:
        begin()
        for client, server in peers.pairs:
            client.close()
            server.close()
        peers.pairs.clear()

    monkeypatch.setattr(tracker._handles, "delete_all", delete_and_open)
    monkeypatch.setattr(tracker.runs, "_begin_epoch", begin_and_close)
    tracker._release_empty(stale)
    monkeypatch.undo()
    assert len(at_port(tracker, peers.port)) == 0
    assert tracker.restored == 0
    ledger = tracker.series.ledger()
    assert ledger.opened.sum() == ledger.closed.sum()
    assert_each_has_one_owner(tracker)


def after_deletion(
    monkeypatch: pytest.MonkeyPatch, tracker: Tracker, action: Callable[[], None]
) -> None:
    """Execute an action between steps 1 and 2 of a release."""
    real = tracker._handles.delete_all

    def delete(handles: Keys) -> None:
        real(handles)
        action()

    monkeypatch.setattr(tracker._handles, "delete_all", delete)


def test_the_old_slot_of_a_handle_with_a_new_slot_is_freed(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """j: Step 4 does not restore the old slot, because the handle has another one."""
    peers.connect(1)
    old = slots_at(tracker, peers.port)
    connections, _ = tracker._used()
    handle = connections["handle"][old][0]
    (new,) = tracker._allocate(1)
    connections["handle"][new] = handle

    def reopened() -> None:
        # The program does this when it finds no handle.
        assert tracker._handles.put_new(handle, new)

    after_deletion(monkeypatch, tracker, reopened)
    assert tracker.release(old, words_at(tracker, old) - ONE_UNIT) == 1
    assert tracker.restored == 0
    assert_each_has_one_owner(tracker)


def test_the_connection_in_an_old_slot_counts_as_closed(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """j: The run found the old slot before step 1. The next run allocated another.

    The fault: if a slot without connection was freed, the ledger missed the closing.
    """
    peers.connect(1)
    old = slots_at(tracker, peers.port)
    connections, all_words = tracker._used()
    word = all_words[old]
    handle = connections["handle"][old][0]
    (new,) = tracker._allocate(1)
    connections["handle"][new] = handle
    all_words[old] = CLOSED  # the state before the run stores its word
    before = tracker.series.ledger().closed.sum()

    def reopened() -> None:
        all_words[old] = word
        assert tracker._handles.put_new(handle, new)

    after_deletion(monkeypatch, tracker, reopened)
    tracker._release_empty(old)
    assert tracker.series.ledger().closed.sum() == before + 1
    assert_each_has_one_owner(tracker)


def test_a_slot_whose_connection_is_opening_is_not_freed(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """g: The program has found the slot but not yet stored the time and series when the
    release reads both.

    The fault: the release freed the slot of an open connection, without any error.
    """
    peers.connect(1)
    slots = slots_at(tracker, peers.port)
    _, all_words = tracker._used()
    words = words_at(tracker, slots)
    all_words[slots] = CLOSED  # the state before the store

    def store_words() -> None:
        all_words[slots] = words

    after_deletion(monkeypatch, tracker, store_words)
    tracker._release_empty(slots)
    monkeypatch.undo()
    assert len(at_port(tracker, peers.port)) == 1
    assert tracker.restored == 1
    assert_each_has_one_owner(tracker)
    for each in peers.pairs.pop():
        each.close()
    assert len(at_port(tracker, peers.port)) == 0


@pytest.mark.parametrize("close", [True, False], ids=["closing", "opening"])
def test_a_program_run_with_a_wrong_slot_changes_nothing(
    tracker: Tracker, peers: Peers, close: bool
) -> None:
    """k: The program reads the slot of another handle, whose connection must not change."""
    peers.connect(2)
    (first, second), other = peers.pairs
    slots = {
        int(each["key"]["remote_port"]): int(slot)
        for slot, (each, word) in enumerate(zip(*tracker._used(), strict=True))
        if numbers(word) and each["key"]["local_port"] == peers.port
    }
    own_slot, other_slot = (slots[each.getsockname()[1]] for each in (first, other[0]))
    connections, all_words = tracker._used()
    before = connections[other_slot].copy(), all_words[other_slot]
    handle = connections["handle"][own_slot]
    with tracker.runs.without_caches():
        tracker._handles.put(handle, np.uint32(other_slot))
    if not close:
        all_words[own_slot] = CLOSED
    first.close()
    second.close()
    if not close:  # some new socket has the same address, and so the same handle
        peers.connect(97)
    assert (connections[other_slot], all_words[other_slot]) == before


@pytest.mark.parametrize("error", [TrackerError, MemoryError])
def test_a_slot_that_cannot_be_released_or_restored_is_reclaimed(
    tracker: Tracker,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    """l: The kernel refuses the release, and the handle already has another slot."""
    peers.connect(1)
    (old,) = slots_at(tracker, peers.port)
    (new,) = tracker._allocate(1)
    connections, all_words = tracker._used()
    handle, word = connections["handle"][old], all_words[old]

    def refuse() -> None:
        connections["handle"][new] = handle
        connections["key"][new] = connections["key"][old]
        all_words[new] = word + ONE_UNIT
        assert tracker._handles.put_new(handle, new)  # as the program does
        raise error("refused")

    after_deletion(monkeypatch, tracker, refuse)
    with pytest.raises(error):
        tracker.release(np.array([old], np.uint32), np.array([word]))
    monkeypatch.undo()
    assert tracker.restored == 1  # this causes a reconciliation
    with Dumps() as dumps:
        assert reconcile.reconcile(tracker, dumps).missed_close == 1
    assert len(at_port(tracker, peers.port)) == 1
    tracker.reclaim()
    assert_each_has_one_owner(tracker)
    for each in peers.pairs.pop():
        each.close()
    assert len(at_port(tracker, peers.port)) == 0


def test_a_slot_whose_release_is_refused_twice_is_freed_once(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """l: The kernel refuses the restoring of the handle, and then the release of the
    orphan."""
    peers.connect(1)
    slots = slots_at(tracker, peers.port)
    words = words_at(tracker, slots)

    def refuse(*_: object) -> bool:
        raise OSError(errno.EBUSY, "refused")

    with monkeypatch.context() as refusing:
        refusing.setattr(tracker._handles, "put_new", refuse)
        # Step 4: the connection has another time, so its handle must be restored.
        assert tracker.release(slots, words - ONE_UNIT) == 0
        assert tracker._orphans == {*slots.tolist()}
    with monkeypatch.context() as refusing:
        refusing.setattr(tracker.runs._barrier, "put", refuse)
        with pytest.raises(TrackerError):
            tracker.release(slots, words)
    assert len(at_port(tracker, peers.port)) == 1
    assert tracker.release(slots, words) == 1
    assert_each_has_one_owner(tracker)


@pytest.mark.timeout(600)
def test_a_million_openings_lose_no_slot(
    own_tracker: Tracker, monkeypatch: pytest.MonkeyPatch, effort: Effort
) -> None:
    """Connections open and close on all CPUs, seeds are added, and slots are reclaimed."""
    tracker = own_tracker
    monkeypatch.setattr(tracker_module, "SPARE_SLOTS", 0)
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as running:
        workers = [
            Worker("tests.kernel.helpers.churn_worker", cpus[number % len(cpus)], port)
            for number, port in enumerate(PORTS)
        ]
        for worker in workers:
            running.callback(worker.kill)
        stop = threading.Event()
        churned = [0] * len(workers)
        threads = [
            threading.Thread(target=keep_busy, args=(worker, stop, churned, number))
            for number, worker in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        try:
            seeded = add_and_release(tracker, lambda: sum(churned), effort)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        events = tracker.events()
        assert seeded + sum(churned) >= effort.of(CYCLES)
        assert sum(churned) >= effort.of(CHURNED)
        # Since Linux 7 a task can be preempted in a tracepoint. The kernel then skips the
        # program for the next task on that CPU, even if there is only one CPU. While this
        # process waits for a CPU, it reclaims no slots.
        reported = events.inserted + events.refused
        assert reported + tracker.missed_events() > sum(churned) / 2
        tracker.reclaim()
        assert_each_has_one_owner(tracker)
        with Dumps() as dumps:
            reconcile.reconcile(tracker, dumps)
        for port in PORTS:
            assert len(at_port(tracker, port)) == ss_established(port)["4"]
        assert_each_has_one_owner(tracker)


def keep_busy(worker: Worker, stop: threading.Event, churned: list[int], at: int) -> None:
    while not stop.is_set():
        worker.ask(connections=211)
        churned[at] += worker.answer()


def add_and_release(tracker: Tracker, churned: Callable[[], int], effort: Effort) -> int:
    """Add and release seeds, some with a wrong time; return the number of seeds."""
    chosen = random.Random(1009)  # noqa: S311  # repeatable
    seeded = 0
    cycles, least_churned = effort.of(CYCLES), effort.of(CHURNED)
    while seeded + churned() < cycles or churned() < least_churned:
        slots = tracker.add(invented(SEEDS))
        seeded += len(slots)
        words = words_at(tracker, slots)
        expected = words.copy()
        # The first seeds get another time: they stay, and are released below.
        expected[: chosen.randrange(7)] += ONE_UNIT
        tracker.release(slots, expected)
        has_stayed = expected != words
        tracker.release(slots[has_stayed], words[has_stayed])
        if chosen.randrange(11) == 0:
            tracker.reclaim()
    return seeded
