# SPDX-License-Identifier: GPL-3.0-only
"""Each series number has one owner and none is lost: the cases of `ebpf.series_numbers`."""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.parts import SERIES_FIRST, OutboundPort, Parts
from tcpexporter.connections.record import CLOSED, SERIES_MASK, Numbers
from tcpexporter.connections.series import (
    NO_SERIES,
    SERIES,
    SERIES_BYTES,
    Ledger,
    Series,
)
from tcpexporter.ebpf.loader_protocol import MAX_SERIES
from tcpexporter.ebpf.ranges import SERIES_RANGE
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import TrackerError
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.in_process import attach, slots_at, words_at
from tests.kernel.helpers.worker import Worker
from tests.kernel.test_slots import PORTS, keep_busy
from tests.support import Peers, repeating

CYCLES = 1_000_003
CHURNED = 200_003
"""Minimum number of changes of real sockets in a test."""

MANY = 4099
FEW = 211
"""A capacity that the local ports of clients soon exceed."""

BY_LOCAL_PORT = Parts(OutboundPort.LOCAL, by_netns=False)


def inbound(port: int, version: int = 4) -> Series:
    """Return the series of the inbound connections of a port."""
    series = np.zeros(1, SERIES)
    series["ip_version"], series["port"] = version, port
    return series.view(SERIES_BYTES)


def number_of(tracker: Tracker, port: int) -> int:
    """Return the number that the map has for the inbound connections of a port."""
    return int(tracker.series._number_of(inbound(port)[0]))


def free_numbers(tracker: Tracker) -> Numbers:
    """Return all numbers on the stack of free ones."""
    free = tracker.series._free
    popped = []
    while (numbers := free.pop()) is not None:
        popped.append(numbers)
    for numbers in reversed(popped):
        free.push(numbers)
    return np.concatenate([np.empty(0, np.uint32), *popped])


def assert_each_has_one_owner(tracker: Tracker) -> None:
    """Check that each number is free, or that of one series, or an orphan.

    No program may run.
    """
    numbered, numbers = tracker.series._numbers.items(SERIES_BYTES, np.uint32)
    orphans = np.array(sorted(tracker.series._orphans), np.uint32)
    free = free_numbers(tracker)
    everywhere = np.concatenate((free, numbers, orphans))
    first = SERIES_FIRST
    assert sorted(everywhere.tolist()) == [*range(first, first + tracker.series.max_series)]
    ledger = tracker.series._ledger.upto(first + tracker.series.max_series)
    assert (ledger["series"][numbers] == numbered).all()
    assert (ledger["series"][orphans] != NO_SERIES).all()
    corrections = tracker.series._corrections.upto(first + tracker.series.max_series)
    for each in (ledger, corrections):
        assert each[free].tobytes() == bytes(len(free) * each.itemsize)


def opened_and_closed(ledger: Ledger, port: int) -> tuple[int, int]:
    """Return the counters of the inbound connections of a port, of all its numbers."""
    is_it = ledger.series == inbound(port)
    return int(ledger.opened[is_it].sum()), int(ledger.closed[is_it].sum())


def close_all(peers: Peers) -> None:
    for client, server in peers.pairs:
        client.close()
        server.close()
    peers.pairs.clear()


def free(
    tracker: Tracker,
    number: int,
    wait: Callable[[], None] | None = None,
    *,
    wait_again: Callable[[], None] | None = None,
) -> None:
    """Free a number; step 2 calls ``wait``, and step 3 calls ``wait_again``."""
    real = tracker.runs.wait
    waits = iter((wait or real, wait_again or real))
    with pytest.MonkeyPatch.context() as patched:

        def next_wait() -> None:
            with pytest.MonkeyPatch.context() as unpatched:
                unpatched.setattr(tracker.runs, "wait", real)
                next(waits)()

        patched.setattr(tracker.runs, "wait", next_wait)
        tracker.series.free(np.array([number], np.uint32), tracker.words)


def test_all_numbers_are_free_at_first(tracker: Tracker) -> None:
    """The lowest number is allocated first; the folded series have the numbers below."""
    numbers = free_numbers(tracker).tolist()
    assert numbers == [*range(SERIES_FIRST, SERIES_FIRST + MAX_SERIES)]
    assert tracker.series.in_use() == 0
    assert_each_has_one_owner(tracker)


def test_connections_of_a_series_have_its_number(tracker: Tracker) -> None:
    """A port of two IP versions has two numbers, and all clients share a third."""
    with Peers("::") as peers:
        peers.connect(7, "127.0.0.1")
        peers.connect(5, "::1")
        words = words_at(tracker, slots_at(tracker, peers.port))
        numbers, counts = np.unique(words & np.uint64(SERIES_MASK), return_counts=True)
        assert sorted(counts.tolist()) == [5, 7]
        assert tracker.series.in_use() == 4  # inbound and outbound, for each version
        ledger = tracker.series.ledger()
        assert sorted(ledger.opened[numbers].tolist()) == [5, 7]
    assert_each_has_one_owner(tracker)


@pytest.mark.parametrize("held", [39, 97])
def test_a_series_is_found_after_ranges_that_late_runs_hold(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """The runs push their ranges back later. With more runs than a host of 20 CPUs can
    have, the series is not found, but its closings are recorded."""
    monkeypatch.setattr(tracker.series, "_untouched", 41 * SERIES_RANGE)
    ranges = [tracker.series._free.pop() for _ in range(held)]
    with Peers() as peers:
        peers.connect(3)
        words = words_at(tracker, slots_at(tracker, peers.port))
        for numbers in reversed(ranges):
            assert numbers is not None
            tracker.series._free.push(numbers)
        is_found = opened_and_closed(tracker.series.ledger(), peers.port) == (3, 0)
        assert is_found == (held == 39)
        tracker.series.record_closed(words, boottime_ns())
    number = number_of(tracker, peers.port)
    assert tracker.series._corrections.upto(number + 1)["closed"][number] == 3
    assert_each_has_one_owner(tracker)


def test_a_number_without_connections_is_freed(tracker: Tracker, peers: Peers) -> None:
    """a: The number is on the stack again, and its counters are forgotten."""
    peers.connect(3)
    number = number_of(tracker, peers.port)
    close_all(peers)
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 3)
    free(tracker, number)
    assert number_of(tracker, peers.port) == 0
    assert number in free_numbers(tracker)
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (0, 0)
    assert_each_has_one_owner(tracker)


def test_a_number_with_a_connection_is_restored(tracker: Tracker, peers: Peers) -> None:
    """b: The run found the number before step 1, and stores it before step 2 has ended."""
    peers.connect(1)
    number = number_of(tracker, peers.port)
    slots = slots_at(tracker, peers.port)
    words = words_at(tracker, slots)
    _, all_words = tracker._used()
    all_words[slots] = CLOSED  # the state before the store

    def store() -> None:
        assert number_of(tracker, peers.port) == 0
        all_words[slots] = words
        tracker.runs.wait()

    free(tracker, number, store)
    assert number_of(tracker, peers.port) == number
    peers.connect(2)
    assert number_of(tracker, peers.port) == number
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 0)
    assert_each_has_one_owner(tracker)


@pytest.mark.parametrize("has_caches", [True, False], ids=["on", "off"])
def test_a_deleted_series_is_found_only_in_a_cache(
    tracker: Tracker, peers: Peers, has_caches: bool
) -> None:
    """The program uses the number again, or allocates another.

    After the caches were off, it uses the other one, too.
    """
    peers.connect(2)
    number = number_of(tracker, peers.port)
    series = inbound(peers.port).view(SERIES)
    if has_caches:
        tracker.series._numbers.delete_all(series)
        peers.connect(3)
        assert number_of(tracker, peers.port) == 0
        assert tracker.series.ledger().opened[number] == 5
        return
    with tracker.runs.without_caches():
        tracker.series._numbers.delete_all(series)
        tracker.runs.wait()
        peers.connect(3)
    peers.connect(5)
    successor = number_of(tracker, peers.port)
    assert successor not in (0, number)
    assert tracker.series.ledger().opened[[number, successor]].tolist() == [2, 8]


def test_counters_of_a_freed_number_go_to_its_successor(
    tracker: Tracker, peers: Peers
) -> None:
    """c: Connections open after step 1. The program allocates another number."""
    peers.connect(5)
    number = number_of(tracker, peers.port)
    close_all(peers)

    def open_more() -> None:
        peers.connect(3)
        tracker.runs.wait()

    free(tracker, number, open_more)
    successor = number_of(tracker, peers.port)
    assert successor not in (0, number)
    assert number in free_numbers(tracker)
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (8, 5)
    assert_each_has_one_owner(tracker)
    close_all(peers)
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (8, 8)


def test_a_series_with_two_numbers_is_counted_in_both(
    tracker: Tracker, peers: Peers
) -> None:
    """d: A run stores the old number, and another one allocates a new number."""
    peers.connect(1)
    number = number_of(tracker, peers.port)
    slots = slots_at(tracker, peers.port)
    words = words_at(tracker, slots)
    _, all_words = tracker._used()
    all_words[slots] = CLOSED  # the state before the store

    def store_and_open() -> None:
        all_words[slots] = words
        peers.connect(2)
        tracker.runs.wait()

    free(tracker, number, store_and_open)
    successor = number_of(tracker, peers.port)
    assert successor not in (0, number)
    assert tracker.series._orphans == {number}
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 0)
    assert_each_has_one_owner(tracker)
    free(tracker, number)  # it still has a connection
    assert tracker.series._orphans == {number}
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 0)
    close_all(peers)
    free(tracker, number)
    assert not tracker.series._orphans
    assert number_of(tracker, peers.port) == successor
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 3)
    assert_each_has_one_owner(tracker)


def test_a_run_with_a_number_of_another_series_does_not_use_it(
    tracker: Tracker, peers: Peers
) -> None:
    """e: The program reads the number of another series, whose counters must not change.

    Here the map keeps the wrong number, so the program cannot allocate another one either.
    It counts the connections in the folded series.
    """
    with Peers() as others:
        others.connect(2)
        peers.connect(1)
        number, other = (number_of(tracker, each.port) for each in (peers, others))
        with tracker.runs.without_caches():
            tracker.series._numbers.put(inbound(peers.port)[0], np.uint32(other))
        peers.connect(3)
        ledger = tracker.series.ledger()
        assert opened_and_closed(ledger, others.port) == (2, 0)
        assert opened_and_closed(ledger, peers.port) == (1, 0)
        assert ledger.opened[1] == 3
        close_all(peers)
        ledger = tracker.series.ledger()
        assert opened_and_closed(ledger, others.port) == (2, 0)
        assert opened_and_closed(ledger, peers.port) == (1, 1)
        assert ledger.closed[1] == 3
        tracker.series._numbers.put(inbound(peers.port)[0], np.uint32(number))
    assert_each_has_one_owner(tracker)


def test_only_one_of_two_allocated_numbers_is_used(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """f: The program allocates a number while userspace does that for the same series."""
    real = tracker.series._numbers.put_new

    def open_first(series: np.uint64, number: np.uint32) -> bool:
        peers.connect(1)
        return real(series, number)

    monkeypatch.setattr(tracker.series._numbers, "put_new", open_first)
    (number,) = tracker.series.numbers(inbound(peers.port)).tolist()
    assert number == number_of(tracker, peers.port)
    assert tracker.series.in_use() == 2
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (1, 0)
    assert_each_has_one_owner(tracker)


def test_a_number_that_a_run_is_pushing_back_is_not_freed(
    tracker: Tracker, peers: Peers
) -> None:
    """f: For an instant the ledger has the series at a number that is not in the map."""
    peers.connect(1)
    number = number_of(tracker, peers.port)
    close_all(peers)
    popped = tracker.series._free.pop()
    assert popped is not None
    of_run = int(popped[0])
    tracker.series._ledger.upto(of_run + 1)["series"][of_run] = inbound(peers.port)[0]
    free(tracker, of_run)
    assert of_run not in free_numbers(tracker)
    tracker.series._ledger.upto(of_run + 1)["series"][of_run] = NO_SERIES
    tracker.series._free.push(popped)
    assert number_of(tracker, peers.port) == number
    assert_each_has_one_owner(tracker)


@pytest.mark.parametrize("step", ["delete", "wait", "memory"])
def test_nothing_is_freed_if_the_kernel_refuses_it(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """g: All numbers and counters stay, and a later attempt frees the number."""
    peers.connect(3)
    number = number_of(tracker, peers.port)
    close_all(peers)

    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "refused")

    error = MemoryError if step == "memory" else TrackerError

    def refuse_to_wait() -> None:
        raise error("refused")

    with monkeypatch.context() as refusing:
        if step == "delete":
            refusing.setattr(tracker.series._numbers, "delete_all", refuse)
        with pytest.raises(error):
            free(tracker, number, refuse_to_wait)
    assert not tracker.series._orphans
    assert number_of(tracker, peers.port) == number
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (3, 3)
    free(tracker, number)
    assert number_of(tracker, peers.port) == 0
    assert_each_has_one_owner(tracker)


def test_series_are_forgotten_later_if_the_kernel_refuses_it(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: the values to forget were lost, and the counters stayed for ever."""
    peers.connect(3)
    number = number_of(tracker, peers.port)
    close_all(peers)
    tracker.series.forget("port", [peers.port])

    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "refused")

    with monkeypatch.context() as refusing:
        refusing.setattr(tracker.series._numbers, "delete_all", refuse)
        with pytest.raises(TrackerError):
            tracker.reclaim()
    assert number_of(tracker, peers.port) == number
    tracker.reclaim()
    assert number_of(tracker, peers.port) == 0
    assert_each_has_one_owner(tracker)


def test_series_that_are_folded_now_are_adopted_together() -> None:
    """Two series of the previous run have one number. The fault: what this run has counted
    for that number was subtracted from each of the two."""
    tracker = attach(max_series=1)
    try:
        while tracker.series._free.pop() is not None:
            pass
        series = np.concatenate((inbound(1), inbound(2)))
        (folded,) = {*tracker.series.numbers(series).tolist()}
        tracker.series.record_seeds(np.full(13, folded, np.uint32), pre_existing=True)
        none = np.zeros(2, np.int64)
        old = Ledger(
            series,
            opened=np.array([11, 7]),
            closed=np.array([5, 3]),
            failed=none,
            pre_existing=np.array([2, 1]),
            lifetimes_sum=none,
            lifetimes=np.zeros((2, 0), np.int64),
        )
        tracker.series.adopt(old)
        now = tracker.series.ledger()
        assert now.pre_existing[folded] == 3
        assert now.opened[folded] == 18
        assert now.opened[folded] - now.closed[folded] + now.pre_existing[folded] == 13
    finally:
        tracker.close()


def test_a_closing_that_is_not_counted_yet_is_not_lost(
    tracker: Tracker, peers: Peers
) -> None:
    """h: A run has stored a closing when 3 looks, and counts it after that.

    Another connection opens meanwhile, so the series has another number and keeps its
    counters.
    """
    peers.connect(3)
    number = number_of(tracker, peers.port)
    close_all(peers)
    ledger = tracker.series._ledger.upto(number + 1)
    ledger["closed"][number] -= 1  # the state before the last closing is counted

    def open_more() -> None:
        peers.connect(1)
        tracker.runs.wait()

    def count_closing() -> None:
        ledger["closed"][number] += 1
        tracker.runs.wait()

    free(tracker, number, open_more, wait_again=count_closing)
    assert opened_and_closed(tracker.series.ledger(), peers.port) == (4, 3)
    assert_each_has_one_owner(tracker)


def test_connections_beyond_the_capacity_are_counted_together() -> None:
    """7 numbers for 23 ports of each IP version: no connection is lost or counted twice."""
    tracker = attach(max_series=7)
    try:
        with contextlib.ExitStack() as opened:
            everyone = []
            for number in range(23):
                for address in ("127.0.0.1", "::1"):
                    peers = opened.enter_context(Peers(address))
                    peers.connect(1 + number % 3)
                    everyone.append(peers)
            true = sum(len(each.pairs) for each in everyone) // 2
            assert true == 45
            ledger = tracker.series.ledger()
            of = ledger.series.view(SERIES)
            for version in (4, 6):
                for is_outbound in (0, 1):
                    is_it = of["ip_version"] == version
                    is_it &= of["flags"] & 1 == is_outbound
                    assert ledger.opened[is_it].sum() == true
            assert ledger.opened[1:3].sum() > 0
            assert tracker.series.in_use() == 7
            assert len(free_numbers(tracker)) == 0
            for peers in everyone:
                close_all(peers)
            ledger = tracker.series.ledger()
            assert (ledger.opened == ledger.closed).all()
            assert ledger.closed.sum() == 4 * true
            tracker.reclaim()
            assert tracker.series.in_use() == 0
            ledger = tracker.series.ledger()
            assert ledger.opened[1:5].tolist() == [true] * 4
            assert ledger.closed[1:5].tolist() == [true] * 4
            everyone[0].connect(1)
            assert number_of(tracker, everyone[0].port) >= SERIES_FIRST
            close_all(everyone[0])
        assert_each_has_one_owner(tracker)
    finally:
        tracker.close()


@pytest.fixture
def few_numbers(netns: str, request: pytest.FixtureRequest) -> Iterator[Tracker]:
    """A tracker with few series numbers, which only one test uses."""
    del netns
    attached = attach(parts=BY_LOCAL_PORT, max_series=request.param)
    yield attached
    attached.close()


@pytest.mark.any_kernel
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("few_numbers", [MANY], indirect=True)
def test_a_million_cycles_lose_no_number(few_numbers: Tracker, effort: Effort) -> None:
    """Numbers are allocated and freed in random order; some have connections."""
    tracker = few_numbers
    chosen = random.Random(1009)  # noqa: S311  # repeatable
    done, port = 0, 0
    held = np.empty(0, np.uint32)
    while done < effort.of(CYCLES):
        series = np.zeros(chosen.randrange(1, 2003), SERIES)
        series["ip_version"] = 4
        series["port"] = np.arange(port, port + len(series)) % 65521
        port += len(series)
        numbers = tracker.series.numbers(series.view(SERIES_BYTES))
        allocated = numbers[numbers >= SERIES_FIRST]
        assert not np.isin(allocated, held).any()
        assert len(np.unique(allocated)) == len(allocated)
        held = np.concatenate((held, allocated))
        done += len(allocated)
        order = np.array(chosen.sample(range(len(held)), len(held)))
        freed = held[order[: chosen.randrange(len(held) + 1)]]
        tracker.series.free(freed, tracker.words)
        held = np.setdiff1d(held, freed)
        if chosen.randrange(11) == 0:
            assert_each_has_one_owner(tracker)
    assert_each_has_one_owner(tracker)
    tracker.series.free(held, tracker.words)
    assert len(free_numbers(tracker)) == MANY


@pytest.mark.timeout(600)
@pytest.mark.parametrize("few_numbers", [FEW], indirect=True)
def test_clients_on_all_cpus_lose_no_number(few_numbers: Tracker, effort: Effort) -> None:
    """Each local port of a client is a series; userspace frees numbers all the while.

    Numbers run out sometimes. The counters balance at the end, whatever was missed. Their
    sum never decreases, although counters of freed numbers are added to others.
    """
    tracker = few_numbers
    cpus = sorted(os.sched_getaffinity(0))
    stop = threading.Event()
    churned = [0] * len(PORTS)
    freed = 0
    totals: list[int] = []

    def read() -> None:
        totals.append(int(tracker.series.ledger().opened.sum()))

    with contextlib.ExitStack() as running:
        threads = []
        for at, port in enumerate(PORTS):
            cpu = cpus[at % len(cpus)]
            worker = Worker("tests.kernel.helpers.churn_worker", cpu, port)
            running.callback(worker.kill)
            arguments = (worker, stop, churned, at)
            threads.append(threading.Thread(target=keep_busy, args=arguments))
        for thread in threads:
            thread.start()
        try:
            running.enter_context(repeating(read, pause_s=0))
            while sum(churned) < effort.of(CHURNED):
                before = tracker.series.in_use()
                tracker.reclaim()
                freed += max(before - tracker.series.in_use(), 0)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert freed > 0
    assert totals == sorted(totals)
    tracker.runs.wait()
    assert_each_has_one_owner(tracker)
    ledger = tracker.series.ledger()
    words = np.concatenate([each.copy() for each in tracker.words()])
    still_open = np.bincount(words & np.uint64(SERIES_MASK), minlength=len(ledger.series))
    balance = ledger.opened - ledger.closed + ledger.pre_existing
    assert (balance[1:] == still_open[1:]).all()
