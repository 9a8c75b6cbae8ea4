# SPDX-License-Identifier: GPL-3.0-only
"""Memory barriers are where tests/unit/ordering assumes them."""

from collections.abc import Callable
from types import ModuleType
from typing import Self

import numpy as np
import pytest

from tcpexporter.connections import matching, memory_order, slot_counts, snapshot
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.expected import End, Rule
from tcpexporter.connections.matching import count_expected
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.record import CLOSED, CONNECTION, Records, Words, words
from tcpexporter.connections.slot_counts import SlotCounts


class RecordingLock:
    def __init__(self) -> None:
        self.done: list[str] = []

    def __enter__(self) -> Self:
        self.done.append("acquire")
        return self

    def __exit__(self, *_: object) -> None:
        self.done.append("release")


@pytest.mark.parametrize("is_total", [False, True])
def test_a_barrier_releases_before_it_acquires(
    monkeypatch: pytest.MonkeyPatch, *, is_total: bool
) -> None:
    """With total store order it does nothing."""
    lock = RecordingLock()
    monkeypatch.setattr(memory_order, "IS_TOTAL", is_total)
    monkeypatch.setattr(memory_order, "_lock", lock)
    memory_barrier()
    assert lock.done == ([] if is_total else ["acquire", "release"] * 2)


def test_a_barrier_works_on_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the lock free."""
    monkeypatch.setattr(memory_order, "IS_TOTAL", False)
    memory_barrier()
    memory_barrier()
    assert not memory_order._lock.locked()


def acting(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, *actions: Callable[[], object]
) -> None:
    """At each barrier of a module, call the next action; there is one for each barrier."""
    waiting = list(actions)

    def act() -> None:
        waiting.pop(0)()

    monkeypatch.setattr(module, "memory_barrier", act)


def slots() -> tuple[Records, Words]:
    """Return two connections, at ports 1 and 2."""
    records = np.zeros(2, CONNECTION)
    records["key"]["local_port"] = 1, 2
    return records, words(np.array([7, 7], np.uint32), np.array([1 << 20] * 2, np.uint64))


def test_fields_are_copied_between_two_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored at the first barrier is found. A word that changes at the second
    barrier excludes its slot."""
    records, all_words = slots()
    acting(
        monkeypatch,
        snapshot,
        lambda: records["key"]["local_port"].__setitem__(0, 3),
        lambda: all_words.__setitem__(1, CLOSED),
    )
    index, _, fields = snapshot.consistent_fields(records, all_words, "key")
    assert index.tolist() == [0]
    assert fields["key"]["local_port"].tolist() == [3]


def test_rules_compare_fields_between_two_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two slots changes before the copy and matches then; the other is excluded."""
    records, all_words = slots()
    acting(
        monkeypatch,
        matching,
        lambda: records["key"]["local_port"].__setitem__(slice(None), 3),
        lambda: all_words.__setitem__(1, CLOSED),
    )
    rule = Rule("three", "three=local=:3", local=End(None, 3, 3))
    windows = [(records, all_words)]
    found = count_expected(windows, [rule], np.uint64(0), lambda _: np.empty(0, np.bool_))
    assert found.established.tolist() == [1]


def nothing() -> None:
    """Change nothing at a barrier."""


def test_clients_are_copied_between_two_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of one of two slots is stored before the copy; the other is excluded."""
    _, all_words = slots()
    clients = np.zeros(2, np.uint64)
    acting(
        monkeypatch,
        slot_counts,
        nothing,
        lambda: clients.__setitem__(0, 5),
        lambda: all_words.__setitem__(1, CLOSED),
    )
    counts = SlotCounts()
    reading = counts.read([Chunk(all_words, clients)], [0], long_term_ns=0)
    assert reading.established[7] == 1
    ((copied, of),) = (each.slots for each in counts._pieces)
    assert copied[1] == CLOSED != copied[0]
    assert of is not None
    assert of[0] == 5


def test_clients_are_compared_after_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the barrier after the words are compared, a client changes: it is noticed."""
    _, all_words = slots()
    clients = np.array([5, 5], np.uint64)
    counts = SlotCounts()
    counts.read([Chunk(all_words, clients)], [0], long_term_ns=0)
    acting(monkeypatch, slot_counts, lambda: clients.__setitem__(0, 3), nothing, nothing)
    reading = counts.read([Chunk(all_words, clients)], [0], long_term_ns=0)
    assert reading.clients is not None
    found = reading.clients.counts(np.array([*[-1] * 7, 0]), 1)
    assert found.established.tolist() == [2]
