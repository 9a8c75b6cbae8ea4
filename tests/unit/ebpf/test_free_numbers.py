# SPDX-License-Identifier: GPL-3.0-only
"""Slots are encoded as ranges, and decoded again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.ebpf.free_numbers import numbers_of, ranges
from tcpexporter.ebpf.ranges import RANGE_SLOTS

LAST = (1 << 24) - 1


@given(
    st.lists(st.integers(0, 3 * RANGE_SLOTS) | st.integers(LAST - 99, LAST), unique=True)
)
def test_ranges_decode_to_the_same_slots(slots: list[int]) -> None:
    """No slot is lost or duplicated, and the order does not change."""
    found = [
        slot
        for each in ranges(np.array(slots, np.uint32)).tolist()
        for slot in numbers_of(each).tolist()
    ]
    assert found == slots


@pytest.mark.parametrize("slots", [1, 255, 256, 257, 1031])
def test_consecutive_slots_share_ranges(slots: int) -> None:
    """A range has 256 slots, and the last one has the rest."""
    found = ranges(np.arange(slots, dtype=np.uint32))
    assert len(found) == -(-slots // RANGE_SLOTS)
    assert [len(numbers_of(each)) for each in found.tolist()] == [
        min(RANGE_SLOTS, slots - first) for first in range(0, slots, RANGE_SLOTS)
    ]
