# SPDX-License-Identifier: GPL-3.0-only
"""Readings that begin with the last one, compared with readings of all slots."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections import clients, slot_counts
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import CLOSED, SERIES_BITS, words
from tcpexporter.connections.slot_counts import SlotCounts

SINCE_NS = [7 << TIME_SHIFT, 3 << TIME_SHIFT]
"""The later one makes connections long-term."""

NUMBERS = 5
ROWS = np.array([-1, 0, 1, 1, 2])
"""The series of each number: two numbers have the same one."""


class Slot(NamedTuple):
    """The number, the time and the client of a slot; number 0: it has no connection."""

    number: int
    unit: int
    client: int


any_slot = st.builds(
    Slot, st.integers(0, NUMBERS - 1), st.integers(0, 11), st.integers(0, 3)
)
any_slots = st.lists(any_slot, max_size=13)


def chunk_of(slots: Sequence[Slot], *, has_clients: bool) -> Chunk:
    made = [each.unit << SERIES_BITS | each.number for each in slots]
    hashes = np.array([each.client for each in slots], np.uint64)
    return Chunk(np.array(made, np.uint64), hashes if has_clients else None)


Shown = list[list[int]]


def read(counts: SlotCounts, chunks: Sequence[Chunk], *, has_clients: bool) -> Shown:
    """Return all numbers of a reading."""
    reading = counts.read(
        chunks,
        SINCE_NS,
        long_term_ns=SINCE_NS[0] if has_clients else None,
    )
    younger = [np.append(each, np.zeros(NUMBERS, np.int64)) for each in reading.younger]
    columns = [reading.established, *younger, reading.times]
    shown = [each[1:NUMBERS].tolist() for each in columns]
    if reading.clients:
        shown += [each.tolist() for each in reading.clients.counts(ROWS, 3)]
    return shown


@given(
    states=st.lists(st.lists(any_slots, max_size=3), max_size=5),
    piece=st.integers(1, 5),
    merged_share=st.sampled_from([100, 0.25, 0.001]),
    has_clients=st.booleans(),
)
def test_a_reading_after_others_is_that_of_all_slots(
    *,
    states: list[list[list[Slot]]],
    piece: int,
    merged_share: float,
    has_clients: bool,
) -> None:
    """This holds for any changes of slots, for slots that are new or missing, for pieces of
    any size, and whether changes are merged or all clients are sorted again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_counts, "PIECE", piece)
        patch.setattr(clients, "MERGED_SHARE", merged_share)
        kept = SlotCounts()
        for state in states:
            chunks = [chunk_of(each, has_clients=has_clients) for each in state]
            found = read(kept, chunks, has_clients=has_clients)
            assert found == read(SlotCounts(), chunks, has_clients=has_clients)


@given(slots=any_slots)
def test_readings_are_those_of_a_python_loop(slots: list[Slot]) -> None:
    """Connections, those that are younger than two bounds, and the sums of their times."""
    found = read(SlotCounts(), [chunk_of(slots, has_clients=False)], has_clients=False)
    numbers = range(1, NUMBERS)
    assert found == [
        [sum(each.number == number for each in slots) for number in numbers],
        [
            sum(each.number == number and each.unit > 7 for each in slots)
            for number in numbers
        ],
        [
            sum(each.number == number and each.unit > 3 for each in slots)
            for number in numbers
        ],
        [sum(each.unit for each in slots if each.number == number) for number in numbers],
    ]


def test_a_reading_after_a_failed_one_counts_all_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out after the first of two chunks, whose slots have changed."""
    before, after = (
        chunk_of([Slot(number, 1, client)] * 7, has_clients=True)
        for number, client in ((1, 2), (4, 3))
    )

    def refuse(*_: object) -> None:
        raise MemoryError

    def failing() -> Iterator[Chunk]:
        yield after
        monkeypatch.setattr(np, "zeros", refuse)
        raise MemoryError

    counts = SlotCounts()
    read(counts, [before, before], has_clients=True)
    with pytest.raises(MemoryError):
        counts.read(failing(), SINCE_NS, long_term_ns=SINCE_NS[0])
    monkeypatch.undo()
    found = read(counts, [before, after], has_clients=True)
    assert found == read(SlotCounts(), [before, after], has_clients=True)


def test_a_client_whose_slots_change_is_counted_in_the_new_series() -> None:
    """One of seven slots gets a client that another series has, one closes, five stay."""
    slots = [Slot(1, 1, client) for client in range(7)]
    counts = SlotCounts()
    read(counts, [chunk_of(slots, has_clients=True)], has_clients=True)
    slots[2:4] = [Slot(4, 2, 5), Slot(0, 1, 3)]
    found = read(counts, [chunk_of(slots, has_clients=True)], has_clients=True)
    assert found[-3:] == [[5, 0, 1], [5, 0, 1], [1, 0, 1]]


def test_only_changed_slots_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 101 clients, three have changed: the others are not sorted again."""
    numbers = np.full(101, 1, np.uint32)
    hashes = np.arange(101, dtype=np.uint64)
    chunk = Chunk(words(numbers, np.zeros(101, np.uint64)), hashes)
    counts = SlotCounts()
    read(counts, [chunk], has_clients=True)
    sorted_keys: list[int] = []
    distinct = clients._distinct

    def spy(keys: clients.ClientKeys) -> object:
        sorted_keys.append(len(keys))
        return distinct(keys)

    monkeypatch.setattr(clients, "_distinct", spy)
    chunk.words[5], hashes[7], hashes[11] = CLOSED, 211, 223
    found = read(counts, [chunk], has_clients=True)
    assert found[-3] == [100, 0, 0]
    assert sorted_keys == []
