# SPDX-License-Identifier: GPL-3.0-only
"""Reads the array of connections while the BPF program writes to it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import Hashes, hashes
from tcpexporter.connections.record import Records, Words, times_ns
from tcpexporter.connections.snapshot import consistent_fields
from tcpexporter.ebpf.free_numbers import Slots
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.ranges import RANGE_SLOTS

WINDOW = 8192
"""Number of slots that are mapped and read at once: 512 KiB."""

UNTOUCHED = 16 * RANGE_SLOTS
"""Reading ends after so many consecutive slots that were never used.

Ranges of slots are allocated in ascending order and used at once. But a CPU can be late to
use the range that it has allocated, so there may be a short gap for an instant.
"""

HANDLE_SEEDED = np.uint64(1)
"""The bit of a handle that marks a seed, as in bpf/tcp_tracker.h."""


@dataclass(frozen=True)
class Known:
    """The connections of a tracker; all arrays have one element for each connection."""

    slots: Slots
    hashes: Hashes
    words: Words
    """``series_and_time``, which identifies a connection in its slot."""
    netns: npt.NDArray[np.uint32]
    is_seed: npt.NDArray[np.bool_]

    @property
    def established_ns(self) -> npt.NDArray[np.uint64]:
        """The times of the connections."""
        return times_ns(self.words)

    def only(self, chosen: npt.NDArray[np.bool_]) -> "Known":
        """Return the connections for which ``chosen`` is true."""
        return Known(*(getattr(self, each.name)[chosen] for each in fields(self)))


def windows(array: MappedArray, slots: int) -> Iterator[Records]:
    """Yield the used part of an array, in chunks of `WINDOW` records.

    Args:
        array: of records with the field ``key``.
        slots: the length of the array.

    Raises:
        OSError: the kernel refuses to map the array.
    """
    for first in range(0, slots, WINDOW):
        window = array.upto(first + WINDOW)[first:]
        yield window
        if not window["key"]["netns"][-UNTOUCHED:].any():
            return


def known_in(array: MappedArray, slots: int) -> Known:
    """Return all connections of an array; connections that change meanwhile may be missing.

    Raises:
        OSError: the kernel refuses to map the array.
    """
    parts = [_known(each, at * WINDOW) for at, each in enumerate(windows(array, slots))]
    return Known(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _known(
    window: Records, first: int
) -> tuple[
    Slots,
    Hashes,
    Words,
    npt.NDArray[np.uint32],
    npt.NDArray[np.bool_],
]:
    """Return the fields of `Known` for a window that begins at the slot ``first``."""
    at, found = consistent_fields(window, "key", "handle")
    slots = at.astype(np.uint32) + np.uint32(first)
    is_seed = found["handle"] & HANDLE_SEEDED != 0
    netns = found["key"]["netns"].copy()
    return slots, hashes(found["key"]), found["series_and_time"], netns, is_seed
