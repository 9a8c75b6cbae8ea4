# SPDX-License-Identifier: GPL-3.0-only
"""Slots are encoded as ranges, and decoded again."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.ebpf.free_numbers import FreeNumbers, numbers_in, ranges
from tcpexporter.ebpf.ranges import RANGE_BITS, RANGE_SLOTS

LAST = (1 << 24) - 1


@given(
    st.lists(st.integers(0, 3 * RANGE_SLOTS) | st.integers(LAST - 99, LAST), unique=True)
)
def test_ranges_decode_to_the_same_slots(slots: list[int]) -> None:
    """No slot is lost or duplicated, and the order does not change."""
    found = [
        slot
        for each in ranges(np.array(slots, np.uint32)).tolist()
        for slot in numbers_in(each).tolist()
    ]
    assert found == slots


@pytest.mark.parametrize("slots", [1, 255, 256, 257, 1031])
def test_consecutive_slots_share_ranges(slots: int) -> None:
    """A range has 256 slots, and the last one has the rest."""
    found = ranges(np.arange(slots, dtype=np.uint32))
    assert len(found) == -(-slots // RANGE_SLOTS)
    assert [len(numbers_in(each)) for each in found.tolist()] == [
        min(RANGE_SLOTS, slots - first) for first in range(0, slots, RANGE_SLOTS)
    ]


@given(
    st.lists(st.integers(0, 3 * RANGE_SLOTS) | st.integers(LAST - 99, LAST), unique=True)
)
def test_no_range_crosses_a_multiple_of_its_maximum_length(slots: list[int]) -> None:
    """So a range fits into 32 bits, and each has at least one number."""
    for each in ranges(np.array(slots, np.uint32)).tolist():
        found = numbers_in(each)
        assert 0 < len(found) <= RANGE_SLOTS
        assert len({*(found // RANGE_SLOTS)}) == 1
        assert found.dtype == np.uint32


@given(st.permutations(range(2 * RANGE_SLOTS - 3, 2 * RANGE_SLOTS + 3)))
def test_ranges_are_as_few_as_possible(numbers: list[int]) -> None:
    """Each consecutive number shares the range of the one before."""
    expected = 1 + sum(
        after != before + 1 or after % RANGE_SLOTS == 0
        for before, after in pairwise(numbers)
    )
    assert len(ranges(np.array(numbers, np.uint32))) == expected


class Stack:
    """A stack in memory that replaces the map."""

    def __init__(self, *_: object) -> None:
        self.values: list[int] = []

    def push(self, value: np.uint32) -> None:
        self.values.append(int(value))

    def pop(self, dtype: type[np.uint32]) -> np.uint32 | None:
        return dtype(self.values.pop()) if self.values else None


@given(
    st.lists(st.lists(st.integers(0, 999), unique=True, max_size=31), max_size=5),
)
def test_freed_numbers_are_allocated_in_the_order_in_which_they_were_freed(
    batches: list[list[int]],
) -> None:
    """The batch that was freed last comes first. No number is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpexporter.ebpf.free_numbers.Map", Stack)
        free = FreeNumbers(0, "free numbers")
    for each in batches:
        free.push(np.array(each, np.uint32))
    popped: list[int] = []
    while (found := free.pop()) is not None:
        popped.extend(found.tolist())
    assert popped == [number for each in reversed(batches) for number in each]
    assert free.pop() is None


def test_the_program_can_split_a_range() -> None:
    """It allocates the first number, and pushes the rest, as in bpf/tcp_tracker.c."""
    (whole,) = ranges(np.arange(512, 512 + 7, dtype=np.uint32)).tolist()
    rest = whole + (1 << RANGE_BITS) - 1
    assert numbers_in(rest).tolist() == [*range(513, 519)]
    assert whole >> RANGE_BITS == 512
