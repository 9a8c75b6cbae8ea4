# SPDX-License-Identifier: GPL-3.0-only
"""Each case of `ebpf.reconcile` is forced with the BPF program and real sockets."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tcpexporter.connections.parts import TIME_SHIFT, Direction
from tcpexporter.connections.record import Records, Words
from tcpexporter.ebpf import reconcile
from tcpexporter.ebpf.free_numbers import Slots
from tcpexporter.ebpf.reconcile import NOTHING, Corrections
from tcpexporter.ebpf.reconciler import Reconciler
from tcpexporter.ebpf.tracker import Tracker
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.in_process import (
    Dumps,
    Reusable,
    all_connections,
    at_port,
    attach,
    invented,
    now_ns,
    put_reported,
    remove_records,
    seeds,
    seen,
    slots_at,
    words_at,
)
from tests.kernel.helpers.shared import EVERY_NAMESPACE, Exporters
from tests.support import Exporter, Peers, eventually, inside, new_netns, ss_established


def run(
    tracker: Tracker, *after: Callable[[], object], hidden_from: int = 0
) -> Corrections:
    """Reconcile; each action happens after one dump."""
    with Dumps(*after, hidden_from=hidden_from) as dumps:
        return reconcile.reconcile(tracker, dumps)


def test_one_dump_suffices_if_nothing_differs(tracker: Tracker, peers: Peers) -> None:
    """If tables and tracker agree, nothing is corrected, and there is no second dump."""
    peers.connect(5)
    with Dumps() as dumps:
        reconcile.seed(tracker, dumps)
        before = dumps.taken
        assert reconcile.reconcile(tracker, dumps) == NOTHING
        assert dumps.taken == before + 1


def test_a_missed_opening_is_added(tracker: Tracker, peers: Peers) -> None:
    """i: It is added with the right direction, and with at most its true age."""
    opened_ns = now_ns()
    peers.connect(5)
    remove_records(tracker, peers.port)
    corrections = run(tracker)
    assert corrections.missed_open == 5
    known = at_port(tracker, peers.port)
    assert len(known) == 5
    assert (known["established_ns"] >= opened_ns).all()
    assert (known["is_outbound"] == Direction.INBOUND).all()


def test_a_connection_that_closes_after_the_first_dump_is_not_added(
    tracker: Tracker, peers: Peers
) -> None:
    """j: It is in the first dump, and closes before the tracker is read: it is not
    added."""
    reusable = Reusable(peers)
    assert run(tracker, reusable.close) == NOTHING
    assert len(at_port(tracker, peers.port)) == 0


def test_a_connection_that_both_dumps_show_by_chance_does_not_stay(
    tracker: Tracker, peers: Peers
) -> None:
    """k: It is open at each dump, but closed when the tracker is read: it does not stay."""
    reusable = Reusable(peers)
    with Dumps() as dumps:

        class Flickering:
            """Opens the connection for the dump and closes it after the dump, twice."""

            def established(self, *, with_ages: bool) -> Records:
                if dumps.taken < 2:
                    if reusable.client.fileno() < 0:
                        reusable.open()
                    dump = dumps.established(with_ages=with_ages)
                    reusable.close()
                    return dump
                return dumps.established(with_ages=with_ages)

            namespaces = dumps.namespaces

        reconcile.reconcile(tracker, Flickering())
    assert len(at_port(tracker, peers.port)) == 0


def test_a_connection_that_does_not_stay_is_never_counted_as_opened(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k: A scrape while it is a seed must not show a counter that decreases later."""
    reusable = Reusable(peers)
    remove_records(tracker, peers.port)
    opened = []
    real = tracker._release

    def release(slots: Slots, words: Words) -> tuple[Slots, Words]:
        opened.append(int(tracker.series.ledger().opened.sum()))
        return real(slots, words)

    with Dumps(lambda: None, reusable.close) as dumps:
        monkeypatch.setattr(tracker, "_release", release)
        reconcile.reconcile(tracker, dumps)
    opened.append(int(tracker.series.ledger().opened.sum()))
    assert len(opened) > 1
    assert {*opened} == {2}
    assert len(at_port(tracker, peers.port)) == 0


@pytest.mark.parametrize("know", [put_reported, Tracker.add], ids=["event", "seed"])
def test_a_missed_closing_is_removed(
    tracker: Tracker, peers: Peers, know: Callable[[Tracker, Records], object]
) -> None:
    """l: The tracker has it but it is not open: it is removed, whatever its handle is."""
    peers.connect(7)
    with Dumps() as dumps:
        reconcile.seed(tracker, dumps)
    know(tracker, invented(3, local_port=peers.port))
    assert len(at_port(tracker, peers.port)) == 10
    assert run(tracker) == Corrections(missed_close=3)
    assert len(at_port(tracker, peers.port)) == 7


@pytest.mark.parametrize("know", [put_reported, Tracker.add], ids=["event", "seed"])
def test_the_older_of_two_connections_with_one_key_is_removed(
    tracker: Tracker, peers: Peers, know: Callable[[Tracker, Records], object]
) -> None:
    """r: Its closing was missed and its reopening reported: the reported connection
    stays."""
    peers.connect(3)
    fresh = at_port(tracker, peers.port)
    stale = fresh.copy()
    stale["established_ns"] = 0
    know(tracker, stale)
    assert len(at_port(tracker, peers.port)) == 6
    assert run(tracker) == Corrections(missed_close=3)
    known = at_port(tracker, peers.port)
    assert sorted(known["established_ns"]) == sorted(fresh["established_ns"])
    assert len(seeds(known)) == 0


def test_a_seed_of_a_reported_connection_is_removed(tracker: Tracker, peers: Peers) -> None:
    """r: The seed is removed even if it is newer, because the kernel's times are exact."""
    peers.connect(3)
    reported = at_port(tracker, peers.port)
    doubles = reported.copy()
    doubles["established_ns"] += np.uint64(1 << TIME_SHIFT)
    tracker.add(doubles)
    time.sleep(0.01)
    assert run(tracker) == Corrections(missed_close=3)
    known = at_port(tracker, peers.port)
    assert sorted(known["established_ns"]) == sorted(reported["established_ns"])


def test_the_next_connection_of_a_socket_shows_that_a_closing_was_missed(
    tracker: Tracker, peers: Peers
) -> None:
    """l: The program detects the stale record when the socket opens again."""
    peers.connect(1)
    before = tracker.events()
    slots = slots_at(tracker, peers.port)
    words = words_at(tracker, slots)
    for client, server in peers.pairs:
        client.close()
        server.close()
    _, all_words = tracker._used()
    # As if the program had missed both closings.
    all_words[slots] = words
    assert len(at_port(tracker, peers.port)) == 1
    for _ in range(97):
        peers.connect(1)
    known = at_port(tracker, peers.port)
    if len(known) == 98:
        pytest.fail("no new socket has the address of a closed one")
    assert len(known) == 97
    assert tracker.events().removed == before.removed + 2 + 1


def test_a_connection_that_opens_after_the_first_dump_is_not_compared(
    tracker: Tracker, peers: Peers
) -> None:
    """m: The first dump does not show it but the tracker does: it is newer, and no
    second dump is made."""
    with Dumps() as dumps:
        reconcile.seed(tracker, dumps)
    with Dumps(lambda: peers.connect(3)) as dumps:
        assert reconcile.reconcile(tracker, dumps) == NOTHING
        assert dumps.taken == 1
    known = at_port(tracker, peers.port)
    assert len(known) == 3
    assert len(seeds(known)) == 0


@pytest.mark.parametrize("dump", [1, 2])
def test_a_connection_that_one_dump_does_not_show_stays(
    tracker: Tracker, peers: Peers, dump: int
) -> None:
    """n, p: Its state was not stored yet, or other sockets of its hash bucket hid it."""
    peers.connect(5)
    with Dumps() as dumps:
        reconcile.seed(tracker, dumps)
    before = at_port(tracker, peers.port)
    assert run(tracker, hidden_from=dump) == NOTHING
    assert (at_port(tracker, peers.port) == before).all()


def test_a_namespace_that_is_not_covered_is_not_compared(tracker: Tracker) -> None:
    """o: The socket tables do not cover the namespace, so its connections stay."""
    tracker.add(invented(5, netns=1))
    assert run(tracker).missed_close == 0
    assert len(seeds(all_connections(tracker))) == 5


def test_a_connection_that_reopens_before_its_removal_keeps_its_time(
    tracker: Tracker, peers: Peers
) -> None:
    """q: Its closing was missed, and its reopening reported just before the removal."""
    reusable = Reusable(peers)
    fresh = at_port(tracker, peers.port)
    stale = np.ones(1, np.uint64)
    assert tracker.release(slots_at(tracker, peers.port), stale) == 0
    assert tracker.restored == 1
    known = at_port(tracker, peers.port)
    assert len(known) == 1
    assert known["established_ns"] == fresh["established_ns"]
    reusable.close()
    assert len(at_port(tracker, peers.port)) == 0


def test_the_closing_of_a_socket_with_a_stale_record_removes_both(
    tracker: Tracker, peers: Peers
) -> None:
    """t: Two events of one socket address were missed; its next closing removes both
    records."""
    peers.connect(1)
    slots = slots_at(tracker, peers.port)
    connections, all_words = tracker._used()
    true = seen(connections[slots], all_words[slots])
    # As if the program had missed the closing of the previous connection at this address
    # and the opening of this one.
    connections["key"]["remote_port"][slots] ^= 1
    tracker.add(true)
    assert len(at_port(tracker, peers.port)) == 2
    for each in peers.pairs.pop():
        each.close()
    assert len(at_port(tracker, peers.port)) == 0
    assert run(tracker) == NOTHING


def test_missed_events_are_corrected(peers: Peers) -> None:
    """The program ignores one in three events; one run corrects all counts."""
    tracker = attach(4096, lose_one_in=3)
    try:
        peers.connect(499)
        for client, server in peers.pairs[:97]:
            client.close()
            server.close()
        assert len(at_port(tracker, peers.port)) != 402
        corrections = run(tracker)
        assert corrections.missed_open > 0
        assert corrections.missed_close > 0
        assert len(at_port(tracker, peers.port)) == 402
        assert ss_established(peers.port) == {"4": 402}
    finally:
        tracker.close()


@contextlib.contextmanager
def reconciling(
    tracker: Tracker, dumps: Dumps, *, interval_s: float, cpu_share: float = 1
) -> Iterator[Reconciler]:
    """Run the thread during the block."""
    reconciler = Reconciler(tracker, dumps, interval_s=interval_s, cpu_share=cpu_share)
    reconciler.start()
    with contextlib.closing(reconciler):
        yield reconciler


def test_the_thread_runs_at_its_interval(tracker: Tracker, peers: Peers) -> None:
    """Although no miss is counted, the run at the interval finds the missed events."""
    with Dumps() as dumps:
        with reconciling(tracker, dumps, interval_s=1) as reconciler:
            peers.connect(3)
            remove_records(tracker, peers.port)
            eventually(lambda: len(at_port(tracker, peers.port)) == 3)
        assert reconciler.state.runs >= 1
        assert reconciler.state.missed_open >= 3
        assert abs(reconciler.state.finished_s - time.time()) < 60


def test_runs_are_skipped_while_no_event_happens(
    tracker: Tracker, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two runs without differences there is no other run until an event happens."""
    # The kernel also counts events of other namespaces that it misses.
    monkeypatch.setattr(tracker, "missed_events", lambda: 0)
    with Dumps() as dumps:
        with reconciling(tracker, dumps, interval_s=0.1) as reconciler:
            eventually(lambda: reconciler.state.runs == 2)
            noted_s = reconciler.state.finished_s
            eventually(lambda: reconciler.state.finished_s > noted_s)
            assert reconciler.state.runs == 2
            peers.connect(1)
            eventually(lambda: reconciler.state.runs == 3)


def test_a_refused_connection_causes_a_run(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal for lack of free slots causes a run at once, without an interval."""
    tracker = attach(16)
    # the kernel may count misses of other namespaces here too
    monkeypatch.setattr(tracker, "missed_events", lambda: 0)
    try:
        with Dumps() as dumps:
            with reconciling(tracker, dumps, interval_s=0) as reconciler:
                eventually(lambda: reconciler.state.runs == 1)
                time.sleep(2.5)
                assert reconciler.state.runs == 1  # this run confirms the seeding
                peers.connect(31)
                eventually(lambda: reconciler.state.runs > 1)
    finally:
        tracker.close()


def test_the_thread_does_not_exceed_its_share_of_cpu(tracker: Tracker) -> None:
    """After each run the thread waits until its average CPU use is below the limit."""
    with Dumps() as dumps:
        with reconciling(tracker, dumps, interval_s=0.1, cpu_share=1e-6) as reconciler:
            eventually(lambda: reconciler.state.runs == 1)
            time.sleep(2.5)
            assert reconciler.state.runs == 1
            assert reconciler.state.interval_s > 100


@pytest.mark.any_kernel
def test_a_full_tracker_warns_and_recovers(effort: Effort) -> None:
    """5,003 connections, 100 slots: there is one warning, and later all counts are
    right."""
    connections = effort.of(5003)
    arguments = ("--max-connections", "100", "--reconcile-interval", "1")
    with (
        Peers(backlog=8192) as peers,
        Exporter("--direction", "all", *arguments) as exporter,
    ):
        assert exporter.value("tcpexporter_max_connections") == 100
        peers.connect(connections)
        counted = exporter.established(peers.port)
        assert counted is not None
        assert 0 < counted <= 100
        tracked = exporter.value("tcpexporter_tracked_connections")
        assert tracked is not None
        assert tracked <= 100
        refused = exporter.value("tcpexporter_kernel_events_total", action="refused")
        assert refused is not None
        missed = exporter.value("tcpexporter_missed_events_total") or 0
        assert refused + missed >= 2 * connections - 100
        eventually(lambda: bool(exporter.value("tcpexporter_refused_seeds_total")))
        for client, server in peers.pairs[:-31]:
            client.close()
            server.close()
        eventually(lambda: exporter.established(peers.port) == 31)
        assert ss_established(peers.port) == {"4": 31}
        _, complaints = exporter.stop()
    warnings = [line for line in complaints.splitlines() if "--max-connections" in line]
    assert len(warnings) == 1


def test_an_idle_preexisting_connection_has_its_age() -> None:
    """It is long-term at once, because the socket tables show how long it has been idle."""
    with Peers() as peers:
        peers.connect(3)
        time.sleep(2.1)
        with Exporter("--source", "ebpf", "--duration", "2") as exporter:
            assert exporter.long_term(peers.port) == 3


def test_ages_of_preexisting_connections_are_lower_bounds() -> None:
    """The age of an active connection is at most its true age."""
    with Peers() as peers:
        opened_ns = now_ns()
        peers.connect(101)
        for client, server in peers.pairs:
            client.send(b"x" * 1009)
            server.recv(1009)
        with Dumps() as dumps:
            seen = dumps.established(with_ages=True)
    assert len(seen) == 202
    assert (seen["established_ns"] >= opened_ns).all()


@pytest.mark.any_kernel
def test_netns_selects_another_namespace() -> None:
    """``--netns NAME`` and ``--netns PATH`` count only that namespace."""
    with new_netns() as elsewhere:
        with inside(elsewhere):
            older = Peers()
            older.connect(5)
        for netns in (elsewhere, f"/run/netns/{elsewhere}"):
            with Peers() as here, Exporter("--netns", netns) as exporter:
                here.connect(2)
                assert exporter.established(older.port) == 5
                assert exporter.established(here.port) is None
        older.close()


def test_namespaces_are_shown_by_name(exporters: Exporters) -> None:
    """``--netns all`` shows the exporter's own namespace as ``self`` and other
    namespaces by name."""
    exporter = exporters(*EVERY_NAMESPACE)
    with new_netns() as elsewhere:
        with inside(elsewhere):
            there = Peers()
            there.connect(5)
        with there, Peers() as here:
            here.connect(2)
            assert exporter.established(here.port, netns="self") == 2
            assert exporter.established(there.port, netns=elsewhere) == 5


@pytest.mark.any_kernel
def test_reconciliation_has_metrics() -> None:
    """All metrics of reconciliation are in the exposition."""
    with Peers() as peers:
        peers.connect(7)
        at_any_cost = ("--reconcile-interval", "1", "--reconcile-cpu", "100")
        with Exporter("--source", "ebpf", *at_any_cost) as exporter:
            assert (exporter.value("tcpexporter_seeded_connections") or 0) >= 14
            eventually(lambda: bool(exporter.value("tcpexporter_reconciliations_total")))
            finished_s = exporter.value("tcpexporter_last_reconcile_timestamp_seconds")
            assert finished_s is not None
            assert abs(finished_s - time.time()) < 60
            assert exporter.value("tcpexporter_missed_events_total") is not None
            assert exporter.value("tcpexporter_corrections_total", kind="missed_open") == 0
            assert exporter.value("tcpexporter_corrections_total", kind="missed_close") == 0
            assert exporter.value("tcpexporter_reconcile_interval_seconds") == 1
            assert exporter.value("tcpexporter_reconcile_duration_seconds")
