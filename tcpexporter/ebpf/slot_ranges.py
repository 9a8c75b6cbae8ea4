# SPDX-License-Identifier: GPL-3.0-only
"""Encodes free slots as ranges, which are the entries of the kernel's stack of free slots.

A range is a number: its first slot above `RANGE_BITS`, and below that its length minus one.
So a million free slots are 4,096 numbers, each of which takes one system call to push.

The loader process imports this module: numpy is imported by the functions that it does not
call, so that its memory limit need not include numpy.
"""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RANGE_BITS = 8
"""Bits of a range that hold its length minus one."""

RANGE_SLOTS = 1 << RANGE_BITS
"""The maximum length of a range."""

SERIES_FIRST = 5
"""The first series number that is free at first, as in bpf/tcp_tracker.h."""

Slots: TypeAlias = "npt.NDArray[np.uint32]"
"""A one-dimensional array of slot numbers."""


def ranges(slots: Slots) -> Slots:
    """Return the fewest ranges that contain exactly these slots, in the same order.

    No range crosses a multiple of `RANGE_SLOTS`.

    Args:
        slots: slot numbers without duplicates; consecutive ones share a range.
    """
    import numpy as np  # noqa: PLC0415

    is_first = np.ones(len(slots), np.bool_)
    is_first[1:] = (np.diff(slots) != 1) | (slots[1:] % RANGE_SLOTS == 0)
    first = np.flatnonzero(is_first)
    counts = np.diff(first, append=len(slots)).astype(np.uint32)
    found: Slots = slots[first] << np.uint32(RANGE_BITS) | counts - np.uint32(1)
    return found


def slots_of(found: int) -> Slots:
    """Return the slots of one range, in ascending order."""
    import numpy as np  # noqa: PLC0415

    first = found >> RANGE_BITS
    return np.arange(first, first + found % RANGE_SLOTS + 1, dtype=np.uint32)
