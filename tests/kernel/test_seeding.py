# SPDX-License-Identifier: GPL-3.0-only
"""Each case of `reconcile.seed` is forced with the BPF program and real sockets."""

import contextlib
import mmap
import time
from collections.abc import Callable, Generator, Iterator

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import hashes
from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import CLOSED, CONNECTION, Records, Words
from tcpexporter.ebpf import connection_array, loader, reconcile
from tcpexporter.ebpf import tracker as tracker_module
from tcpexporter.ebpf.connection_array import ConnectionArray
from tcpexporter.ebpf.maps import Keys
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import SocketTableError, TrackerError
from tcpexporter.socket_tables import entries, sock_diag
from tcpexporter.socket_tables.tables import SocketTables, open_tables
from tests.kernel.helpers.in_process import (
    SLOTS,
    Dumps,
    Reusable,
    all_connections,
    at_port,
    attach,
    free_slots,
    invented,
    now_ns,
    put_reported,
    remove_records,
    seeds,
    taken_slots,
)
from tests.support import Exporter, Peers, eventually, inside, new_netns


def seed(tracker: Tracker, *after: Callable[[], object]) -> None:
    """Seed; each action happens after the dump."""
    with Dumps(*after) as dumps:
        reconcile.seed(tracker, dumps)
        assert dumps.taken == 1


def test_preexisting_connections_are_seeded(peers: Peers) -> None:
    """a: It was open before the program was attached. It is added with at most its true
    age."""
    opened_ns = now_ns()
    peers.connect(5)
    tracker = attach()
    try:
        seed(tracker)
        found = seeds(at_port(tracker, peers.port))
        assert len(found) == 5
        assert (found["established_ns"] >= opened_ns).all()
        assert (found["established_ns"] <= boottime_ns()).all()
        assert (found["is_outbound"] == Direction.INBOUND).all()
        peers.pairs[0][0].close()
        assert len(at_port(tracker, peers.port)) == 4
    finally:
        tracker.close()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump has many batches."""
    monkeypatch.setattr(entries, "BATCH", 1)
    monkeypatch.setattr(sock_diag, "REPLY_BYTES", sock_diag.DATAGRAM_BYTES)


@pytest.mark.usefixtures("small_parts")
def test_connections_are_seeded_in_parts(peers: Peers) -> None:
    """a, b: Those that opened before the program was attached become seeds, each once, and
    are in the ledger; those that it has reported do not."""
    peers.connect(251)
    tracker = attach()
    try:
        peers.connect(13)
        with contextlib.closing(open_tables("sock_diag", "self")) as tables:
            batches = Batches(tables)
            reconcile.seed_in_batches(tracker, batches.read())
        assert batches.number > 1
        found = at_port(tracker, peers.port)
        assert len(found) == 264
        assert len(seeds(found)) == 251
        ledger = tracker.series.ledger()
        assert int(ledger.pre_existing.sum()) == tracker.seeds(tracker.events())
    finally:
        tracker.close()


class Batches:
    """Reads tables in batches, and acts after the first one."""

    def __init__(
        self, tables: SocketTables, then: Callable[[], object] = lambda: None
    ) -> None:
        self.number = 0
        self._tables = tables
        self._then = then

    def read(self) -> Generator[Records, None, None]:
        for each in self._tables.batches():
            self.number += 1
            if self.number == 2:
                self._then()
            yield each


@pytest.mark.usefixtures("small_parts")
def test_connections_that_close_while_later_parts_are_read_do_not_stay(
    tracker: Tracker, peers: Peers
) -> None:
    """d, g: Their seeds are added with an earlier or a later batch; the log has the
    closings."""
    peers.connect(251)
    remove_records(tracker, peers.port)
    with contextlib.closing(open_tables("sock_diag", "self")) as tables:
        batches = Batches(tables, peers.close)
        reconcile.seed_in_batches(tracker, batches.read())
    assert batches.number > 1
    assert len(at_port(tracker, peers.port)) == 0


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_cannot_be_read_is_an_error(tracker: Tracker) -> None:
    """The error reaches the caller, and the tables can be read again."""

    def refuse() -> None:
        raise SocketTableError("the dump is incomplete")

    with contextlib.closing(open_tables("sock_diag", "self")) as tables:
        with Peers() as peers:
            peers.connect(300)
            with pytest.raises(SocketTableError):
                reconcile.seed_in_batches(tracker, Batches(tables, refuse).read())
        assert len(tables.established()) >= 0


def test_reported_connections_do_not_become_seeds(tracker: Tracker, peers: Peers) -> None:
    """b: It opened before the dump, when the program was attached. It counts once, and
    keeps its exact time."""
    peers.connect(5)
    opened_ns = now_ns()
    seed(tracker)
    known = at_port(tracker, peers.port)
    assert len(known) == 5
    assert (known["established_ns"] <= opened_ns).all()
    assert len(seeds(known)) == 0


def test_a_connection_that_opens_after_the_dump_keeps_its_time(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """c: It counts once, and keeps the exact time from the kernel."""
    del reusable
    times_ns = []

    def open_more() -> None:
        times_ns.append(now_ns())
        peers.connect(3)
        times_ns.append(now_ns())

    seed(late_tracker, open_more)
    known = at_port(late_tracker, peers.port)
    assert len(known) == 4
    assert len(seeds(known)) == 1
    reported_ns = known["established_ns"][known["handle"] & 1 == 0]
    assert (reported_ns >= times_ns[0]).all()
    assert (reported_ns <= times_ns[1]).all()


@pytest.fixture
def reusable(tracker: Tracker, peers: Peers) -> Iterator[Reusable]:
    """A connection, which is closed before another test uses the tracker."""
    del tracker
    made = Reusable(peers)
    yield made
    made.close()


@pytest.fixture
def late_tracker(tracker: Tracker, reusable: Reusable, peers: Peers) -> Tracker:
    """A tracker that was attached after the connection had opened."""
    remove_records(tracker, peers.port)
    remove_records(tracker, reusable.client.getsockname()[1])
    assert len(all_connections(tracker)) == 0
    return tracker


Step = str
STEPS = ("dump", "known", "slots", "seeds")
"""Steps of seeding, after each of which a test can act.

- ``dump``: the socket tables have been read.
- ``known``: the tracker has been read.
- ``slots``: the program finds the new seeds, and no reader counts them yet.
- ``seeds``: the seeds are complete.
"""


def seed_with(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, step: Step, act: Callable[[], object]
) -> None:
    """Seed, and act once after this one of `STEPS`."""
    acted: list[bool] = []

    def act_once() -> None:
        if not acted:
            acted.append(True)
            act()

    def then_act(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: object, **named: object) -> object:
            outcome = real(*arguments, **named)
            act_once()
            return outcome

        monkeypatch.setattr(owner, name, wrapped)

    if step == "dump":
        seed(tracker, act_once)
    else:
        wrapped_there = {
            "known": (tracker, "known"),
            "slots": (tracker._handles, "put_all"),
            "seeds": (tracker, "add"),
        }
        then_act(*wrapped_there[step])
        seed(tracker)
    assert acted


@pytest.mark.parametrize("step", STEPS)
def test_a_connection_that_closes_while_seeding_does_not_stay(
    late_tracker: Tracker,
    reusable: Reusable,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    step: Step,
) -> None:
    """d, e, g: It closes after any of the steps, and is not in the tracker at the end."""
    seed_with(late_tracker, monkeypatch, step, reusable.close)
    assert len(at_port(late_tracker, peers.port)) == 0
    assert late_tracker.seeds(late_tracker.events()) == len(
        seeds(all_connections(late_tracker))
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_connection_that_reopens_while_seeding_has_its_own_time(
    late_tracker: Tracker,
    reusable: Reusable,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    step: Step,
) -> None:
    """f: It reopens after any step. It counts once, with the kernel's time."""
    times_ns = []

    def reopen() -> None:
        times_ns.append(now_ns())
        reusable.reopen()

    seed_with(late_tracker, monkeypatch, step, reopen)
    known = at_port(late_tracker, peers.port)
    assert len(known) == 1
    assert known["established_ns"][0] >= times_ns[0]
    assert len(seeds(known)) == 0


def test_a_reported_connection_may_close_after_the_dump(
    tracker: Tracker, peers: Peers
) -> None:
    """d: It was reported, is in the dump, and closes before the tracker is read: no
    seed."""
    reusable = Reusable(peers)
    seed(tracker, reusable.close)
    assert len(at_port(tracker, peers.port)) == 0


def test_unrecorded_closings_are_counted_and_corrected(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """h: The closings log is full, which causes a reconciliation: the stale seed is
    removed."""
    with late_tracker.recording_closings():
        handles = np.arange(loader.MAX_CLOSINGS, dtype=np.uint64)
        values = handles.astype(np.uint32)
        assert late_tracker._closings._map.put_all(handles, values) == len(handles)
        with Dumps(reusable.close) as dumps:
            shown = dumps.established(with_ages=True)
            dump = reconcile.Dump(boottime_ns(), hashes(shown["key"]))
            is_missing = reconcile.compare(late_tracker, dumps, dump).is_missing
        reconcile._add(late_tracker, shown[is_missing])
    assert late_tracker.events().unrecorded == 2
    assert len(at_port(late_tracker, peers.port)) == 1
    time.sleep(0.01)
    with Dumps() as dumps:
        assert reconcile.reconcile(late_tracker, dumps).missed_close == 2
    assert len(at_port(late_tracker, peers.port)) == 0


def test_a_closing_that_is_recorded_while_a_seed_is_added_removes_it(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """e: The run that records it began before the seed was added, and did not find it.

    Meanwhile the ledger already has the seeds: a scrape shows no connection that is not
    opened. The closed one counts as closed.
    """
    before = tracker.series.ledger()
    slots = tracker.add(invented(7))
    (closing,) = tracker._used()[0]["handle"][slots[:1]]
    opened: list[int] = []
    wait = tracker.runs.wait

    def end_the_run() -> None:
        if not opened:  # the log has been read once
            opened.append(int(tracker.series.ledger().opened.sum()))
            tracker._closings._map.put(closing, np.uint32(0))
        wait()

    monkeypatch.setattr(tracker.runs, "wait", end_the_run)
    assert tracker.release_closed(slots) == 1
    assert opened == [int(before.opened.sum()) + 7]
    after = tracker.series.ledger()
    assert int(after.closed.sum() - before.closed.sum()) == 1
    assert tracker.seeds(tracker.events()) == 6


def test_a_seed_that_closes_during_seeding_is_freed_once(tracker: Tracker) -> None:
    """It closes between two batches; both are seeds, and the log has both closings.

    The fault: the second batch got the slot of the first, which was then freed twice.
    """
    with tracker.recording_closings():
        slots = tracker.add(invented(1))
        handles = [tracker._used()[0]["handle"][slots]]
        tracker._used()[1][slots] = CLOSED  # as the program does
        slots = np.concatenate((slots, tracker.add(invented(1, local_port=2))))
        handles.append(tracker._used()[0]["handle"][slots[1:]])
        tracker._used()[1][slots] = CLOSED
        for handle in np.concatenate(handles):
            tracker._closings._map.put(handle, np.uint32(0))
        tracker.release_closed(slots)
    assert len({*slots.tolist()}) == 2
    free = free_slots(tracker).tolist()
    assert len(free) == len({*free})


@pytest.mark.parametrize("error", [TrackerError, MemoryError])
def test_seeds_that_are_not_written_lose_no_slot(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The first batch is in the ledger; the slots of the others are freed later."""
    monkeypatch.setattr(tracker_module, "WINDOW", 7)
    real = tracker._handles.put_all
    written: list[int] = []

    def put_all(handles: Keys, slots: Keys) -> int:
        if written:
            raise error("refused")
        written.append(real(handles, slots))
        return written[0]

    before = tracker.series.ledger().opened.sum()
    monkeypatch.setattr(tracker._handles, "put_all", put_all)
    with pytest.raises(error), tracker.recording_closings():
        tracker.add(invented(23))
    assert tracker.series.ledger().opened.sum() == before + 7
    assert tracker.restored == 16
    tracker.reclaim()
    everywhere = np.concatenate((free_slots(tracker), taken_slots(tracker)))
    assert sorted(everywhere.tolist()) == list(range(SLOTS))


def test_windows_full_of_seeds_are_not_searched_for_reported_connections(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the slots of several windows, 3 have reported connections, and share a window with
    seeds."""
    window = mmap.PAGESIZE // CONNECTION.itemsize
    monkeypatch.setattr(connection_array, "WINDOW", window)
    read: list[int] = []
    records_of = ConnectionArray._records

    def spy(array: ConnectionArray, at: int, words: Words) -> Records:
        read.append(at)
        return records_of(array, at, words)

    with tracker.recording_closings():
        tracker.add(invented(2 * window + 11, local_port=1))
        reported = invented(3, local_port=2)
        put_reported(tracker, reported)
        tracker.add(invented(2 * window + 29, local_port=3))
        monkeypatch.setattr(ConnectionArray, "_records", spy)
        found = tracker.known(with_seeds=False)
    assert sorted(found.hashes.tolist()) == sorted(hashes(reported["key"]).tolist())
    assert read[:3] == [0, 2, 4]
    assert len(tracker.known().slots) == 4 * window + 43


def test_closings_are_only_recorded_during_a_comparison(
    tracker: Tracker, peers: Peers
) -> None:
    """At other times the closings log stays empty."""
    peers.connect(3)
    peers.close()
    assert len(tracker._closings.pop()) == 0


def test_a_block_that_records_waits_for_the_runs_of_an_earlier_one(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that found the flag of the earlier block records its closing after its end.

    That closing belongs to no connection of the next dump, so it must not be in the log.
    """
    wait, waits = tracker.runs.wait, 0

    def end_the_run() -> None:
        nonlocal waits
        if not waits:
            tracker._closings._map.put(np.uint64(1009), np.uint32(0))
        waits += 1
        wait()

    with tracker.recording_closings():
        pass
    monkeypatch.setattr(tracker.runs, "wait", end_the_run)
    with tracker.recording_closings():
        assert waits == 2
        assert 1009 not in tracker._closings.pop()


def test_refused_seeds_are_counted(tracker: Tracker) -> None:
    """A seed without a free slot is counted as refused; the others are added."""
    assert len(tracker.add(invented(1031))) == SLOTS
    assert tracker.seeds_refused == 1031 - SLOTS
    assert len(seeds(all_connections(tracker))) == tracker.seeds(tracker.events()) == SLOTS


def test_the_program_finds_a_seed_by_its_key(peers: Peers) -> None:
    """C and Python compute the same hash: of IPv4, IPv6 and an IPv4 client of ``::``."""
    with Peers("::") as both:
        peers.connect(3)
        both.connect(5, "::1")
        both.connect(7, "127.0.0.1")
        tracker = attach()
        try:
            seed(tracker)
            assert tracker.seeds(tracker.events()) == 30
            peers.close()
            both.close()
            assert tracker.seeds(tracker.events()) == 0
            assert len(all_connections(tracker)) == 0
        finally:
            tracker.close()


def test_a_key_is_not_added_twice(tracker: Tracker) -> None:
    """Two sockets with one key on two devices cannot be distinguished: there is one
    seed."""
    twice = np.concatenate((invented(5), invented(3)))
    assert len(tracker.add(twice)) == 5
    assert len(tracker.add(twice)) == 0
    assert tracker.seeds_refused == 0
    assert len(seeds(all_connections(tracker))) == 5


def test_a_seed_can_be_added_again_when_it_has_closed(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """Its closing was reported and its reopening missed, so it becomes a seed again."""
    seed(late_tracker)
    reusable.close()
    assert len(at_port(late_tracker, peers.port)) == 0
    reusable.open()
    remove_records(late_tracker, peers.port)
    seed(late_tracker)
    assert len(seeds(at_port(late_tracker, peers.port))) == 1
    reusable.close()
    assert len(at_port(late_tracker, peers.port)) == 0


def test_preexisting_connections_are_long_term_after_the_duration() -> None:
    """The exporter counts pre-existing IPv4, IPv6 and v4-mapped connections after its
    start."""
    with Peers() as four, Peers("::") as both:
        four.connect(7)
        both.connect(5, "127.0.0.1")
        both.connect(3, "::1")
        with Exporter("--source", "ebpf", "--duration", "1") as exporter:
            eventually(lambda: exporter.long_term(four.port) == 7)
            eventually(lambda: exporter.long_term(both.port, 4) == 5)
            eventually(lambda: exporter.long_term(both.port, 6) == 3)
            four.pairs[0][0].close()
            assert exporter.long_term(four.port) == 6


def test_preexisting_outbound_connections_are_not_inbound() -> None:
    """Only one end has a listener at its port."""
    with Peers() as peers:
        peers.connect(2)
        ephemeral = peers.pairs[0][0].getsockname()[1]
        with Exporter("--direction", "outbound") as exporter:
            assert exporter.established(ephemeral) == 1
            assert exporter.established(peers.port) == 0


def test_preexisting_connections_of_every_namespace_are_counted() -> None:
    """``--netns all`` includes a namespace without any process."""
    with new_netns() as elsewhere:
        with inside(elsewhere):
            peers = Peers("::1")
            peers.connect(5)
        with peers, Exporter("--netns", "all") as exporter:
            assert exporter.established(peers.port, 6, netns=elsewhere) == 5
