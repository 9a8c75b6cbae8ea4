# SPDX-License-Identifier: GPL-3.0-only
"""Slots that are free, as the kernel's stack of ranges has them; pure functions.

A range is a number: its first slot above `RANGE_BITS`, and how many there are less one.
So a million free slots are 4,096 numbers, each of which takes a system call to push.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.ebpf.loader import RANGE_BITS, RANGE_SLOTS

Slots: TypeAlias = npt.NDArray[np.uint32]


def ranges(slots: Slots) -> Slots:
    """The fewest ranges that have just these ``slots``, ascending like them.

    None goes over a multiple of `RANGE_SLOTS`, so that those of all slots end there.
    """
    is_first = np.ones(len(slots), np.bool_)
    is_first[1:] = (np.diff(slots) != 1) | (slots[1:] % RANGE_SLOTS == 0)
    first = np.flatnonzero(is_first)
    counts = np.diff(first, append=len(slots)).astype(np.uint32)
    found: Slots = slots[first] << np.uint32(RANGE_BITS) | counts - np.uint32(1)
    return found


def slots_of(found: int) -> Slots:
    """The slots of one range."""
    first = found >> RANGE_BITS
    return np.arange(first, first + found % RANGE_SLOTS + 1, dtype=np.uint32)
