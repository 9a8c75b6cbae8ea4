# SPDX-License-Identifier: GPL-3.0-only
"""Each case of `ebpf.reconcile`, a to t, with a tracker and socket tables in memory.

The kernel tests force the same cases with the BPF program and real sockets.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.clock import boottime_ns
from tcpexporter.ebpf.reconcile import (
    NOTHING,
    Corrections,
    begin_dump,
    compare,
    reconcile,
    seed,
)
from tests.unit.ebpf.fake_tracker import (
    Action,
    FakeKernel,
    FakeSocket,
    FakeTables,
    FakeTracker,
)

PORT = 10007
OTHER_PORT = 10009
OTHER_NETNS = 4026532009

STEPS = ("dump", "known", "handles", "add")
"""Steps of seeding, after each of which a test can act.

- ``dump``: the socket tables have been read.
- ``known``: the tracker has been read.
- ``handles``: the program finds the new seeds, and no reader counts them yet.
- ``add``: the seeds are complete.
"""


@pytest.fixture
def tracker() -> FakeTracker:
    return FakeTracker()


@pytest.fixture
def kernel(tracker: FakeTracker) -> FakeKernel:
    return FakeKernel(tracker)


def remote_ports(kernel: FakeKernel) -> list[int]:
    """The remote ports of all connections that the tracker has; its ledger balances."""
    assert kernel.tracker.is_balanced()
    known = kernel.tracker.known()
    ports = kernel.tracker.connections["key"]["remote_port"][known.slots]
    return sorted(ports.tolist())


def seeds(kernel: FakeKernel) -> int:
    """The number of connections that came from the socket tables."""
    return int(kernel.tracker.known().is_seed.sum())


def run(kernel: FakeKernel, *after: Action, hidden_from: int = 0) -> Corrections:
    """Reconcile once; each action happens after one socket-table dump."""
    return reconcile(kernel.tracker, FakeTables(kernel, *after, hidden_from=hidden_from))


def seed_with(kernel: FakeKernel, step: str, act: Action) -> None:
    """Seed, and act once after one of `STEPS`."""
    if step == "dump":
        seed(kernel.tracker, FakeTables(kernel, act))
    else:
        kernel.tracker.after[step] = act
        seed(kernel.tracker, FakeTables(kernel))
        assert not kernel.tracker.after


def test_a_preexisting_connection_becomes_a_seed(kernel: FakeKernel) -> None:
    """a: It opened before the program was attached. Its closing removes the seed."""
    before_ns = boottime_ns()
    open_before = kernel.open(PORT, is_missed=True)
    seed(kernel.tracker, FakeTables(kernel))
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 1
    assert kernel.tracker.known().established_ns[0] >= before_ns
    kernel.close(open_before)
    assert remote_ports(kernel) == []


def test_a_reported_connection_does_not_become_a_seed(kernel: FakeKernel) -> None:
    """b: It opened before the dump, when the program was attached."""
    kernel.open(PORT)
    times_ns = kernel.tracker.known().established_ns
    seed(kernel.tracker, FakeTables(kernel))
    assert seeds(kernel) == 0
    assert kernel.tracker.known().established_ns == times_ns


def test_a_connection_that_opens_after_the_dump_keeps_its_time(kernel: FakeKernel) -> None:
    """c: The tracker has the exact time of the new connection, and a seed of the old
    one."""
    kernel.open(PORT, is_missed=True)
    times_ns: list[int] = []

    def open_another() -> None:
        times_ns.append(boottime_ns())
        kernel.open(OTHER_PORT)
        times_ns.append(boottime_ns())

    seed(kernel.tracker, FakeTables(kernel, open_another))
    assert remote_ports(kernel) == [PORT, OTHER_PORT]
    known = kernel.tracker.known()
    (reported_ns,) = known.established_ns[~known.is_seed]
    assert times_ns[0] <= reported_ns <= times_ns[1]


@pytest.mark.parametrize("is_missed", [True, False], ids=["unknown", "known"])
@pytest.mark.parametrize("step", ["dump", "known"])
def test_a_connection_that_closes_after_the_dump_does_not_stay(
    kernel: FakeKernel, step: str, is_missed: bool
) -> None:
    """d: The dump shows it, whether the program knows it or not. It closes before step
    2."""
    closing = kernel.open(PORT, is_missed=is_missed)
    seed_with(kernel, step, lambda: kernel.close(closing))
    assert remote_ports(kernel) == []


def test_a_connection_that_closes_while_seeds_are_added_does_not_stay(
    kernel: FakeKernel,
) -> None:
    """e: The program finds the handle of an incomplete seed; step 3 removes the seed."""
    closing = kernel.open(PORT, is_missed=True)
    seed_with(kernel, "handles", lambda: kernel.close(closing))
    assert remote_ports(kernel) == []


@pytest.mark.parametrize("is_same_socket", [True, False], ids=["same", "another"])
@pytest.mark.parametrize("step", STEPS)
def test_a_connection_that_reopens_while_seeding_has_its_own_time(
    kernel: FakeKernel, step: str, is_same_socket: bool
) -> None:
    """f: The same or another socket opens the same address pair again. It counts once."""
    old = kernel.open(PORT, is_missed=True)
    times_ns: list[int] = []

    def reopen() -> None:
        kernel.close(old)
        times_ns.append(boottime_ns())
        kernel.open(PORT, address=old.address if is_same_socket else None)

    seed_with(kernel, step, reopen)
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 0
    assert kernel.tracker.known().established_ns[0] >= times_ns[0]


def test_a_connection_that_closes_as_a_complete_seed_does_not_stay(
    kernel: FakeKernel,
) -> None:
    """g: The program removes the seed. A connection that opens right afterwards stays."""
    closing = kernel.open(PORT, is_missed=True)

    def close_and_open_another() -> None:
        kernel.close(closing)
        kernel.open(OTHER_PORT)

    seed_with(kernel, "add", close_and_open_another)
    assert remote_ports(kernel) == [OTHER_PORT]


def test_a_missed_closing_during_seeding_is_counted_and_corrected(
    kernel: FakeKernel,
) -> None:
    """h: The kernel skips the program. The seed is stale until the next reconciliation."""
    closing = kernel.open(PORT, is_missed=True)
    missed = kernel.tracker.events().missed
    seed_with(kernel, "dump", lambda: kernel.close(closing, is_missed=True))
    assert remote_ports(kernel) == [PORT]
    assert kernel.tracker.events().missed == missed + 1
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == []


def test_a_closing_without_capacity_in_the_log_is_counted_and_corrected() -> None:
    """h: The closings log is full. The seed is stale until the next reconciliation."""
    kernel = FakeKernel(FakeTracker(max_closings=0))
    closing = kernel.open(PORT, is_missed=True)
    seed_with(kernel, "dump", lambda: kernel.close(closing))
    assert remote_ports(kernel) == [PORT]
    assert kernel.tracker.events().unrecorded == 1
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == []


def test_a_missed_opening_is_added(kernel: FakeKernel) -> None:
    """i: Both dumps show it, and the tracker does not have it."""
    kernel.open(PORT, is_missed=True)
    assert run(kernel) == Corrections(missed_open=1)
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 1
    assert run(kernel) == NOTHING


def test_a_connection_that_closes_before_the_tracker_is_read_is_not_added(
    kernel: FakeKernel,
) -> None:
    """j: Only the first dump shows it."""
    closing = kernel.open(PORT)
    assert run(kernel, lambda: kernel.close(closing)) == NOTHING
    assert remote_ports(kernel) == []


def test_a_connection_that_both_dumps_show_by_chance_does_not_stay(
    kernel: FakeKernel,
) -> None:
    """k: It is open at each dump, but closed when the tracker is read. Step 3 removes
    its seed."""
    current: list[FakeSocket] = [kernel.open(PORT)]

    def close() -> None:
        kernel.close(current.pop())

    def reopen() -> None:
        current.append(kernel.open(PORT))

    kernel.tracker.after["known"] = reopen
    assert run(kernel, close, close) == NOTHING
    assert remote_ports(kernel) == []


@pytest.mark.parametrize("is_seed", [False, True], ids=["event", "seed"])
def test_a_missed_closing_is_removed(kernel: FakeKernel, is_seed: bool) -> None:
    """l: Neither dump shows it, so it is removed, whatever its handle is. The other one
    stays."""
    kernel.open(OTHER_PORT)
    closing = kernel.open(PORT, is_missed=is_seed)
    seed(kernel.tracker, FakeTables(kernel))
    kernel.close(closing, is_missed=True)
    assert remote_ports(kernel) == [PORT, OTHER_PORT]
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == [OTHER_PORT]


def test_the_program_corrects_a_missed_closing_when_it_sees_the_socket_again(
    kernel: FakeKernel,
) -> None:
    """l: The next connection of the same socket replaces the stale record."""
    stale = kernel.open(PORT)
    kernel.close(stale, is_missed=True)
    kernel.open(OTHER_PORT, address=stale.address)
    assert remote_ports(kernel) == [OTHER_PORT]
    assert kernel.tracker.events().removed == 1
    assert run(kernel) == NOTHING


def test_a_connection_that_opens_after_the_first_dump_is_not_compared(
    kernel: FakeKernel,
) -> None:
    """m: The tracker has it and the dump does not. No second dump is necessary."""
    tables = FakeTables(kernel, lambda: kernel.open(PORT))
    assert reconcile(kernel.tracker, tables) == NOTHING
    assert tables.dumps == 1
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 0


def test_an_opening_that_is_reported_before_it_is_stored_stays(kernel: FakeKernel) -> None:
    """n: The first dump does not show it yet, but the second one does."""
    opening = kernel.open(PORT, is_stored=False)

    def store() -> None:
        opening.is_established = True

    assert run(kernel, store) == NOTHING
    assert remote_ports(kernel) == [PORT]


def test_a_namespace_that_is_not_covered_is_not_compared(kernel: FakeKernel) -> None:
    """o: The socket tables do not cover its namespace, so it stays."""
    there = kernel.open(PORT, netns=OTHER_NETNS)
    there.is_established = False  # the namespaces that the socket tables cover
    assert run(kernel) == NOTHING
    assert remote_ports(kernel) == [PORT]


@pytest.mark.parametrize("dump", [1, 2])
def test_a_connection_that_one_dump_does_not_show_stays(
    kernel: FakeKernel, dump: int
) -> None:
    """p: Other connections of its hash bucket hide it from one dump."""
    kernel.open(PORT)
    seed(kernel.tracker, FakeTables(kernel))
    assert run(kernel, hidden_from=dump) == NOTHING
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 0


@pytest.mark.parametrize("is_same_socket", [True, False], ids=["same", "another"])
def test_a_connection_that_reopens_before_its_removal_keeps_its_time(
    kernel: FakeKernel, is_same_socket: bool
) -> None:
    """q: Its closing was missed. Its reopening is reported just before the removal."""
    stale = kernel.open(PORT)
    kernel.close(stale, is_missed=True)
    times_ns: list[int] = []

    def reopen() -> None:
        # The first release is that of step 3, which has nothing to remove.
        kernel.tracker.after["release"] = reopen_now

    def reopen_now() -> None:
        times_ns.append(boottime_ns())
        kernel.open(PORT, address=stale.address if is_same_socket else None)

    kernel.tracker.after["release"] = reopen
    assert run(kernel) == Corrections(missed_close=int(not is_same_socket))
    assert kernel.tracker.restored == is_same_socket
    assert remote_ports(kernel) == [PORT]
    assert kernel.tracker.known().established_ns[0] >= times_ns[0]


@pytest.mark.parametrize("is_seed", [False, True], ids=["event", "seed"])
def test_the_older_of_two_connections_with_one_key_is_removed(
    kernel: FakeKernel, is_seed: bool
) -> None:
    """r: Its closing was missed, and another socket has the same key. Only one can be
    open."""
    stale = kernel.open(PORT, is_missed=is_seed)
    seed(kernel.tracker, FakeTables(kernel))
    kernel.close(stale, is_missed=True)
    opened_ns = boottime_ns()
    kernel.open(PORT)
    assert remote_ports(kernel) == [PORT, PORT]
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == [PORT]
    assert seeds(kernel) == 0
    assert kernel.tracker.known().established_ns[0] >= opened_ns


def test_a_seed_is_removed_before_a_reported_connection_with_its_key(
    kernel: FakeKernel,
) -> None:
    """r: This holds even if the seed seems to be newer."""
    kernel.open(PORT)
    reported_ns = kernel.tracker.known().established_ns
    kernel.tracker.add(FakeTables(kernel).established(with_ages=True))
    assert remote_ports(kernel) == [PORT, PORT]
    assert run(kernel) == Corrections(missed_close=1)
    assert kernel.tracker.known().established_ns == reported_ns


def test_a_closing_that_is_stored_late_is_corrected_by_the_next_run(
    kernel: FakeKernel,
) -> None:
    """s: Its closing is reported before both dumps, but stored after them. It is added
    and later removed."""
    preempted = kernel.open(PORT)
    kernel.close(preempted, is_stored=False)
    assert run(kernel) == Corrections(missed_open=1)
    preempted.is_established = False
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == []


def test_a_missed_closing_that_is_stored_late_is_corrected_by_the_next_run(
    kernel: FakeKernel,
) -> None:
    """s: Tables and tracker agree at first. They differ after the state is stored."""
    preempted = kernel.open(PORT)
    kernel.close(preempted, is_missed=True, is_stored=False)
    assert run(kernel) == NOTHING
    preempted.is_established = False
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == []


def test_a_closing_that_is_stored_after_seeding_is_corrected(kernel: FakeKernel) -> None:
    """s: Its closing is reported before closings are recorded. The seed is stale until
    the next reconciliation."""
    preempted = kernel.open(PORT)
    kernel.close(preempted, is_stored=False)
    seed(kernel.tracker, FakeTables(kernel))
    assert seeds(kernel) == 1
    preempted.is_established = False
    assert run(kernel) == Corrections(missed_close=1)
    assert remote_ports(kernel) == []


@pytest.fixture
def with_stale_record(kernel: FakeKernel) -> FakeSocket:
    """Return a socket whose opening was missed. The tracker still has the record of its
    previous connection."""
    stale = kernel.open(OTHER_PORT)
    kernel.close(stale, is_missed=True)
    opened = kernel.open(PORT, address=stale.address, is_missed=True)
    assert remote_ports(kernel) == [OTHER_PORT]
    return opened


def test_a_socket_with_a_stale_record_is_corrected(
    kernel: FakeKernel, with_stale_record: FakeSocket
) -> None:
    """t: One run adds the connection and removes the stale record. Its closing is then
    handled."""
    assert run(kernel) == Corrections(missed_open=1, missed_close=1)
    assert remote_ports(kernel) == [PORT]
    kernel.close(with_stale_record)
    assert remote_ports(kernel) == []


def test_the_closing_of_a_socket_with_a_stale_record_removes_both(
    kernel: FakeKernel, with_stale_record: FakeSocket
) -> None:
    """t: It is a seed when it closes. The program finds another key in the record."""
    seed_with(kernel, "add", lambda: kernel.close(with_stale_record))
    assert remote_ports(kernel) == []
    assert run(kernel) == NOTHING


def test_a_full_tracker_refuses_and_is_corrected_later() -> None:
    """Without a free slot, an opening is refused and counted. A later run adds it."""
    kernel = FakeKernel(FakeTracker(slots=1))
    first = kernel.open(PORT)
    kernel.open(OTHER_PORT)
    assert kernel.tracker.events().refused == 1
    assert run(kernel) == Corrections(refused=1)
    kernel.tracker.release(np.zeros(1, np.uint32), kernel.tracker.known().words)
    first.is_established = False
    assert run(kernel) == Corrections(missed_open=1)
    assert remote_ports(kernel) == [OTHER_PORT]


CHANGES = st.lists(
    st.tuples(st.sampled_from(["open", "close"]), st.integers(0, 4), st.booleans()),
    max_size=7,
)
"""What opens and closes: the offset of the port, and whether the event is missed."""


@given(CHANGES, CHANGES, CHANGES)
def test_the_first_dump_may_be_older_than_the_reading_of_the_tracker(
    before: list[tuple[str, int, bool]],
    meanwhile: list[tuple[str, int, bool]],
    after: list[tuple[str, int, bool]],
) -> None:
    """Connections open and close before the dump, then before the comparison, and then
    before the correction: later runs make the tracker equal to the kernel.

    An event that the program gets is never undone: a connection keeps the kernel's time.
    """
    kernel = FakeKernel(FakeTracker())
    opened: dict[int, FakeSocket] = {}
    reported: dict[int, int] = {}

    def change(chosen: list[tuple[str, int, bool]]) -> None:
        for what, offset, is_missed in chosen:
            if what == "open" and offset not in opened:
                if not is_missed:
                    reported[offset] = boottime_ns()
                opened[offset] = kernel.open(PORT + offset, is_missed=is_missed)
            elif what == "close" and offset in opened:
                reported.pop(offset, None)
                kernel.close(opened.pop(offset), is_missed=is_missed)

    tables = FakeTables(kernel)
    change(before)
    dump = begin_dump(
        kernel.tracker, (tables.established(with_ages=False) for _ in range(1))
    ).result()
    change(meanwhile)
    first = compare(kernel.tracker, tables, dump)
    change(after)
    reconcile(kernel.tracker, tables, pre_existing=True, first=first)
    assert NOTHING in (reconcile(kernel.tracker, tables) for _ in range(7))
    assert remote_ports(kernel) == sorted(PORT + each for each in opened)
    known = kernel.tracker.known()
    ports = kernel.tracker.connections["key"]["remote_port"][known.slots].tolist()
    times_ns = dict(zip(ports, known.established_ns.tolist(), strict=True))
    for offset, since_ns in reported.items():
        assert times_ns[PORT + offset] >= since_ns
        assert not known.is_seed[ports.index(PORT + offset)]
