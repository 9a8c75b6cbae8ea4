# SPDX-License-Identifier: GPL-3.0-only
"""Seeding with real BPF and sockets, each interleaving of `reconcile.seed` forced."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.record import Direction, directions
from tcpexporter.ebpf import loader, reconcile
from tcpexporter.ebpf.tracker import Tracker
from tests.kernel.helpers.in_process import (
    SLOTS,
    Dumps,
    Reusable,
    at_port,
    attach,
    everything,
    forget,
    made,
    seeds,
)
from tests.support import Exporter, Peers, eventually, inside, new_netns


def seed(tracker: Tracker, *after: Callable[[], object]) -> None:
    """Seed with those things happening after the look."""
    with Dumps(*after) as dumps:
        reconcile.seed(tracker, dumps)
        assert dumps.taken == 1


def test_connections_from_before_are_seeded(peers: Peers) -> None:
    """a: what was open before the program was attached, no older than it is."""
    opened_ns = boottime_ns()
    peers.connect(5)
    tracker = attach()
    try:
        seed(tracker)
        found = seeds(at_port(tracker, peers.port))
        assert len(found) == 5
        assert (found["established_ns"] >= opened_ns).all()
        assert (found["established_ns"] <= boottime_ns()).all()
        assert (directions(found["group"]) == Direction.INBOUND).all()
        peers.pairs[0][0].close()
        assert len(at_port(tracker, peers.port)) == 4
    finally:
        tracker.close()


def test_what_the_kernel_told_is_not_seeded(tracker: Tracker, peers: Peers) -> None:
    """b: opened while attached, before the first look: once, with the kernel's time."""
    peers.connect(5)
    opened_ns = boottime_ns()
    seed(tracker)
    known = at_port(tracker, peers.port)
    assert len(known) == 5
    assert (known["established_ns"] <= opened_ns).all()
    assert len(seeds(known)) == 0


def test_what_opens_after_the_look_keeps_its_time(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """c: opened after the look: once, with the kernel's time, beside the seed."""
    del reusable
    times_ns = []

    def open_more() -> None:
        times_ns.append(boottime_ns())
        peers.connect(3)
        times_ns.append(boottime_ns())

    seed(late_tracker, open_more)
    known = at_port(late_tracker, peers.port)
    assert len(known) == 4
    assert len(seeds(known)) == 1
    told_ns = known["established_ns"][known["handle"] & 1 == 0]
    assert (told_ns >= times_ns[0]).all()
    assert (told_ns <= times_ns[1]).all()


@pytest.fixture
def reusable(tracker: Tracker, peers: Peers) -> Iterator[Reusable]:
    """A connection that is closed before the tracker is anybody else's."""
    del tracker
    made = Reusable(peers)
    yield made
    made.close()


@pytest.fixture
def late_tracker(tracker: Tracker, reusable: Reusable, peers: Peers) -> Tracker:
    """One that knows nothing of the connection, as if attached when it was there."""
    forget(tracker, peers.port)
    forget(tracker, reusable.client.getsockname()[1])
    assert len(everything(tracker)) == 0
    return tracker


Step = str
STEPS = ("look", "known", "slots", "seeds")
"""After which something happens: the look at the tables, that at the tracker, when the
program finds the new seeds but nobody else does yet, and when they are there."""


def seed_with(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, step: Step, act: Callable[[], object]
) -> None:
    """Seed with something happening once, after one of `STEPS`."""
    acted: list[bool] = []

    def act_once() -> None:
        if not acted:
            acted.append(True)
            act()

    def then_act(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: object) -> object:
            outcome = real(*arguments)
            act_once()
            return outcome

        monkeypatch.setattr(owner, name, wrapped)

    if step == "look":
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
def test_what_closes_while_it_becomes_a_seed_does_not_stay(
    late_tracker: Tracker,
    reusable: Reusable,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    step: Step,
) -> None:
    """d, e, g: closed after any of the steps, it is gone in the end."""
    seed_with(late_tracker, monkeypatch, step, reusable.close)
    assert len(at_port(late_tracker, peers.port)) == 0
    assert late_tracker.seeds() == len(seeds(everything(late_tracker)))


@pytest.mark.parametrize("step", STEPS)
def test_what_is_reopened_while_it_becomes_a_seed_has_its_own_time(
    late_tracker: Tracker,
    reusable: Reusable,
    peers: Peers,
    monkeypatch: pytest.MonkeyPatch,
    step: Step,
) -> None:
    """f: closed and opened anew after any of the steps: once, with the kernel's time."""
    times_ns = []

    def reopen() -> None:
        times_ns.append(boottime_ns())
        reusable.reopen()

    seed_with(late_tracker, monkeypatch, step, reopen)
    known = at_port(late_tracker, peers.port)
    assert len(known) == 1
    assert known["established_ns"][0] >= times_ns[0]
    assert len(seeds(known)) == 0


def test_what_the_kernel_told_and_the_look_saw_may_close(
    tracker: Tracker, peers: Peers
) -> None:
    """d: known by its socket, in the look, closed before the tracker is read: no seed."""
    reusable = Reusable(peers)
    seed(tracker, reusable.close)
    assert len(at_port(tracker, peers.port)) == 0


def test_closings_without_a_note_are_counted_and_made_good(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """h: no room for the note: a reason to reconcile, which finds the stale seed."""
    with late_tracker.recording_closings():
        handles = np.arange(loader.MAX_CLOSINGS, dtype=np.uint64)
        values = handles.astype(np.uint32)
        assert late_tracker._closings.put_all(handles, values) == len(handles)
        with Dumps(reusable.close) as dumps:
            found = reconcile._differences(late_tracker, dumps, boottime_ns()).missing
        reconcile._add(late_tracker, found)
    assert late_tracker.unrecorded_closings() == 2
    assert len(at_port(late_tracker, peers.port)) == 1
    time.sleep(0.01)
    with Dumps() as dumps:
        assert reconcile.reconcile(late_tracker, dumps).missed_close == 2
    assert len(at_port(late_tracker, peers.port)) == 0


def test_nothing_is_noted_when_nobody_compares(tracker: Tracker, peers: Peers) -> None:
    """Closings cost a note only while there is somebody to read it."""
    peers.connect(3)
    peers.close()
    assert len(tracker._pop_closings()) == 0


def test_more_seeds_than_fit_are_reported(tracker: Tracker) -> None:
    """What finds no room is counted, what fits is kept."""
    assert len(tracker.add(made(1031))) == SLOTS
    assert tracker.seeds_refused == 1031 - SLOTS
    assert len(seeds(everything(tracker))) == tracker.seeds() == SLOTS


def test_the_program_finds_a_seed_by_its_key(peers: Peers) -> None:
    """Both sides compute the same hash: of IPv4, of IPv6, of an IPv4 client of ::."""
    with Peers("::") as both:
        peers.connect(3)
        both.connect(5, "::1")
        both.connect(7, "127.0.0.1")
        tracker = attach()
        try:
            seed(tracker)
            assert tracker.seeds() == 30
            peers.close()
            both.close()
            assert tracker.seeds() == 0
            assert len(everything(tracker)) == 0
        finally:
            tracker.close()


def test_a_key_is_not_added_twice(tracker: Tracker) -> None:
    """Two sockets of one key on two devices cannot be told apart: they are one seed."""
    twice = np.concatenate((made(5), made(3)))
    assert len(tracker.add(twice)) == 5
    assert len(tracker.add(twice)) == 0
    assert tracker.seeds_refused == 0
    assert len(seeds(everything(tracker))) == 5


def test_a_seed_can_be_added_again_when_it_has_closed(
    late_tracker: Tracker, reusable: Reusable, peers: Peers
) -> None:
    """Its closing was told, its reopening missed: it has another slot or the same."""
    seed(late_tracker)
    reusable.close()
    assert len(at_port(late_tracker, peers.port)) == 0
    reusable.open()
    forget(late_tracker, peers.port)
    seed(late_tracker)
    assert len(seeds(at_port(late_tracker, peers.port))) == 1
    reusable.close()
    assert len(at_port(late_tracker, peers.port)) == 0


def test_preexisting_connections_are_long_term_after_the_duration() -> None:
    """The command counts IPv4, IPv6 and v4-mapped connections from its start."""
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
    """Only the port of one end has a listener."""
    with Peers() as peers:
        peers.connect(2)
        ephemeral = peers.pairs[0][0].getsockname()[1]
        with Exporter("--direction", "outbound") as exporter:
            assert exporter.established(ephemeral) == 1
            assert exporter.established(peers.port) == 0


def test_preexisting_connections_of_every_namespace_are_counted() -> None:
    """``--netns all`` includes a namespace that no process is in."""
    with new_netns() as elsewhere:
        with inside(elsewhere):
            peers = Peers("::1")
            peers.connect(5)
        with peers, Exporter("--netns", "all") as exporter:
            assert exporter.established(peers.port, 6, netns=elsewhere) == 5
