# SPDX-License-Identifier: GPL-3.0-only
"""Allocates numbers from a stack that the BPF program uses too, in ranges.

A range is encoded as one number: its first element times `RANGE_SLOTS`, plus its length
minus one. So a million free slots are 3,907 ranges, and one system call pushes each.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.ebpf.maps import Map
from tcpexporter.ebpf.ranges import RANGE_BITS, RANGE_SLOTS

Slots: TypeAlias = npt.NDArray[np.uint32]
"""A one-dimensional array of slot numbers, or of series numbers."""


class FreeNumbers:
    """The stack of the free slots, or of the free series numbers."""

    def __init__(self, descriptor: int, what: str) -> None:
        """Use the descriptor of a stack, as `Map` does."""
        self._stack = Map(descriptor, what)

    def pop(self) -> Slots | None:
        """Allocate a range; return its numbers in ascending order, or None if none is free.

        Raises:
            OSError: the kernel refuses the operation.
        """
        popped = self._stack.pop(np.uint32)
        return None if popped is None else numbers_in(int(popped))

    def push(self, numbers: Slots) -> None:
        """Free numbers; the first is the next to be allocated.

        Raises:
            OSError: the kernel refuses the operation.
        """
        for each in reversed(ranges(numbers).tolist()):
            self._stack.push(np.uint32(each))


def ranges(numbers: Slots) -> Slots:
    """Encode numbers as the fewest ranges, in the same order.

    No range crosses a multiple of `RANGE_SLOTS`.

    Args:
        numbers: without duplicates; consecutive ones share a range.
    """
    is_first = np.ones(len(numbers), np.bool_)
    is_first[1:] = (np.diff(numbers) != 1) | (numbers[1:] % RANGE_SLOTS == 0)
    first = np.flatnonzero(is_first)
    counts = np.diff(first, append=len(numbers)).astype(np.uint32)
    found: Slots = numbers[first] << np.uint32(RANGE_BITS) | counts - np.uint32(1)
    return found


def numbers_in(found: int) -> Slots:
    """Return the numbers of one encoded range, in ascending order."""
    first = found >> RANGE_BITS
    return np.arange(first, first + found % RANGE_SLOTS + 1, dtype=np.uint32)
