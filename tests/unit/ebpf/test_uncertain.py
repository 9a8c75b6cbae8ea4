# SPDX-License-Identifier: GPL-3.0-only
"""The bound of the difference between the tracker and the kernel is never too small."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.ebpf.reconcile import Corrections, seed
from tcpexporter.ebpf.reconciler import Reconciler
from tests.unit.ebpf.fake_tracker import NETNS, FakeKernel, FakeTables, FakeTracker
from tests.unit.ebpf.test_reconcile import OTHER_PORT, PORT


def reconciler_of(kernel: FakeKernel) -> Reconciler:
    """Return a reconciler whose thread is not started."""
    return Reconciler(kernel.tracker, FakeTables(kernel), interval_s=60, cpu_share=1)


def run(reconciler: Reconciler) -> Corrections:
    """Reconcile once, as the thread does."""
    corrections, _ = reconciler._run(reconciler._event_counts())
    return corrections


def uncertain(reconciler: Reconciler) -> int:
    """Return the present bound, as a scrape does."""
    return reconciler.uncertain(reconciler._tracker.events())


def difference(kernel: FakeKernel) -> int:
    """Return how many connections only the tracker or only the kernel has."""
    known = kernel.tracker.known()
    tracked = Counter(
        kernel.tracker.connections["key"]["remote_port"][known.slots].tolist()
    )
    there = Counter(
        int(each.key["remote_port"][0]) for each in kernel.sockets if each.is_established
    )
    return sum(((tracked - there) + (there - tracked)).values())


def test_without_missed_events_the_numbers_are_exact() -> None:
    """Neither pre-existing connections nor events make them uncertain."""
    kernel = FakeKernel(FakeTracker())
    kernel.open(PORT, is_missed=True)
    kernel.tracker._events.clear()  # before the program was attached, nothing is counted
    seed(kernel.tracker, FakeTables(kernel))
    reconciler = reconciler_of(kernel)
    kernel.close(kernel.open(OTHER_PORT))
    assert uncertain(reconciler) == difference(kernel) == 0
    assert run(reconciler) == Corrections()
    assert uncertain(reconciler) == 0


def miss_opening(kernel: FakeKernel) -> None:
    kernel.open(PORT, is_missed=True)


def miss_closing(kernel: FakeKernel) -> None:
    kernel.close(kernel.open(PORT), is_missed=True)


def miss_both(kernel: FakeKernel) -> None:
    kernel.close(kernel.open(PORT, is_missed=True), is_missed=True)


def reuse_a_stale_socket(kernel: FakeKernel) -> None:
    stale = kernel.open(OTHER_PORT)
    kernel.close(stale, is_missed=True)
    kernel.open(PORT, address=stale.address, is_missed=True)


@pytest.mark.parametrize(
    ("act", "missed", "corrections"),
    [
        (miss_opening, 1, Corrections(missed_open=1)),
        (miss_closing, 1, Corrections(missed_close=1)),
        (miss_both, 2, Corrections()),
        (reuse_a_stale_socket, 2, Corrections(missed_open=1, missed_close=1)),
    ],
)
def test_missed_events_are_uncertain_until_a_run_finds_nothing(
    act: Callable[[FakeKernel], None], missed: int, corrections: Corrections
) -> None:
    """A run that has corrected something may be wrong itself, so the next one decides."""
    kernel = FakeKernel(FakeTracker())
    reconciler = reconciler_of(kernel)
    act(kernel)
    assert uncertain(reconciler) == missed >= difference(kernel)
    assert run(reconciler) == corrections
    corrected = corrections.missed_open + corrections.missed_close
    assert uncertain(reconciler) == (missed + corrected if corrected else 0)
    assert run(reconciler) == Corrections()
    assert uncertain(reconciler) == difference(kernel) == 0


def test_the_bound_does_not_include_later_namespaces() -> None:
    """Their socket tables cannot be read: only the number of missed events shows the
    error."""
    kernel = FakeKernel(FakeTracker())
    reconciler = reconciler_of(kernel)
    later = kernel.open(PORT, netns=NETNS + 1)
    kernel.close(later, is_missed=True)
    assert uncertain(reconciler) == difference(kernel) == 1
    assert run(reconciler) == Corrections()
    assert difference(kernel) == 1
    assert uncertain(reconciler) == 0
    assert kernel.tracker.events().missed == 1


def test_an_event_that_is_missed_during_a_run_stays_uncertain() -> None:
    """The run began before the event, so its tables may not show the connection."""
    kernel = FakeKernel(FakeTracker())
    tables = FakeTables(kernel, lambda: kernel.open(PORT, is_missed=True))
    reconciler = Reconciler(kernel.tracker, tables, interval_s=60, cpu_share=1)
    assert run(reconciler) == Corrections()
    assert uncertain(reconciler) == difference(kernel) == 1


def test_a_refused_connection_is_uncertain_until_it_is_added() -> None:
    """The event of its opening found no free slot, and neither does the run."""
    kernel = FakeKernel(FakeTracker(slots=1))
    reconciler = reconciler_of(kernel)
    first = kernel.open(PORT)
    kernel.open(OTHER_PORT)
    assert uncertain(reconciler) == difference(kernel) == 1
    for _ in range(3):
        assert run(reconciler) == Corrections(refused=1)
        assert uncertain(reconciler) >= difference(kernel) == 1
    kernel.close(first, is_missed=True)
    assert run(reconciler).missed_close == 1
    assert uncertain(reconciler) >= difference(kernel)
    assert run(reconciler) == Corrections(missed_open=1)
    assert run(reconciler) == Corrections()
    assert uncertain(reconciler) == difference(kernel) == 0


def test_refused_seeds_are_uncertain_before_the_first_run() -> None:
    """There are more pre-existing connections than slots."""
    kernel = FakeKernel(FakeTracker(slots=3))
    for port in range(1, 8):
        kernel.open(port, is_missed=True)
    kernel.tracker._events.clear()
    seed(kernel.tracker, FakeTables(kernel))
    reconciler = reconciler_of(kernel)
    assert kernel.tracker.seeds_refused == 4
    assert uncertain(reconciler) == difference(kernel) == 4
    assert run(reconciler) == Corrections(refused=4)
    assert uncertain(reconciler) == difference(kernel) == 4


def test_an_unrecorded_closing_is_uncertain() -> None:
    """The closings log was full while connections were added."""
    kernel = FakeKernel(FakeTracker(max_closings=0))
    closing = kernel.open(PORT, is_missed=True)
    kernel.tracker._events.clear()
    seed(kernel.tracker, FakeTables(kernel, lambda: kernel.close(closing)))
    reconciler = reconciler_of(kernel)
    assert uncertain(reconciler) == difference(kernel) == 1
    assert run(reconciler) == Corrections(missed_close=1)
    assert run(reconciler) == Corrections()
    assert uncertain(reconciler) == difference(kernel) == 0


steps = st.lists(
    st.tuples(
        st.sampled_from(["open", "reopen", "close", "run"]),
        st.integers(0, 6),
        st.booleans(),
    ),
    max_size=41,
)


@given(
    steps=steps,
    slots=st.sampled_from([1, 3, 97]),
    max_closings=st.sampled_from([0, 101]),
    pre_existing=st.integers(0, 5),
)
def test_the_bound_is_at_least_the_difference(
    *, steps: list[tuple[str, int, bool]], slots: int, max_closings: int, pre_existing: int
) -> None:
    """This holds after each step of a random walk, and two clean runs make it 0."""
    kernel = FakeKernel(FakeTracker(slots=slots, max_closings=max_closings))
    for port in range(pre_existing):
        kernel.open(port, is_missed=True)
    kernel.tracker._events.clear()
    seed(kernel.tracker, FakeTables(kernel))
    reconciler = reconciler_of(kernel)
    for step, which, is_missed in steps:
        open_now = {
            int(each.key["remote_port"][0]): each
            for each in kernel.sockets
            if each.is_established
        }
        if step == "run":
            run(reconciler)
        elif which in open_now:
            if step == "close":
                kernel.close(open_now[which], is_missed=is_missed)
        elif step == "open":
            kernel.open(which, is_missed=is_missed)
        elif step == "reopen":
            kernel.open(which, address=address_of_a_closed(kernel), is_missed=is_missed)
        assert uncertain(reconciler) >= difference(kernel)
        assert kernel.tracker.is_balanced()
    for _ in range(5):
        run(reconciler)
    assert uncertain(reconciler) >= difference(kernel)
    if run(reconciler) == Corrections():
        assert uncertain(reconciler) == difference(kernel) == 0


def address_of_a_closed(kernel: FakeKernel) -> int | None:
    """Return the address of a socket that has closed, if no open one has it."""
    in_use = {each.address for each in kernel.sockets if each.is_established}
    return next(
        (each.address for each in kernel.sockets if each.address not in in_use), None
    )
