# SPDX-License-Identifier: GPL-3.0-only
"""Free slots as ranges, and ranges as slots."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.ebpf.slot_ranges import RANGE_SLOTS, ranges, slots_of

LAST = (1 << 24) - 1


@given(
    st.lists(st.integers(0, 3 * RANGE_SLOTS) | st.integers(LAST - 99, LAST), unique=True)
)
def test_ranges_have_just_the_slots_they_were_made_from(slots: list[int]) -> None:
    """None is lost, none comes twice, in whatever order they are."""
    found = [
        slot
        for each in ranges(np.array(slots, np.uint32)).tolist()
        for slot in slots_of(each).tolist()
    ]
    assert found == slots


@pytest.mark.parametrize("slots", [1, 255, 256, 257, 1031])
def test_all_slots_are_few_ranges(slots: int) -> None:
    """A range holds 256; the last one has the rest."""
    found = ranges(np.arange(slots, dtype=np.uint32))
    assert len(found) == -(-slots // RANGE_SLOTS)
    assert [len(slots_of(each)) for each in found.tolist()] == [
        min(RANGE_SLOTS, slots - first) for first in range(0, slots, RANGE_SLOTS)
    ]
