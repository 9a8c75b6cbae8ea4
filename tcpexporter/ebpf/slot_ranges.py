# SPDX-License-Identifier: GPL-3.0-only
"""Encodes free slots as ranges: the entries of the BPF program's stack of free slots.

A range is a number. Its low `RANGE_BITS` bits are the length minus one; the bits above are
the first slot. So a million free slots are 4,096 numbers. Pushing a number requires one
system call.

The loader process imports this module, and its memory limit does not include numpy. So only
functions that the loader does not call import numpy.
"""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RANGE_BITS = 8
"""Number of bits of a range for its length minus one."""

RANGE_SLOTS = 1 << RANGE_BITS
"""The maximum length of a range."""

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
