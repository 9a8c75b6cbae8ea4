# SPDX-License-Identifier: GPL-3.0-only
"""Reads the array of connections while the BPF program writes to it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.identity import Clients, Hashes, hashes
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.record import CONNECTION, SERIES_MASK, Records, Words, times_ns
from tcpexporter.connections.snapshot import consistent_fields
from tcpexporter.ebpf.free_numbers import Slots
from tcpexporter.ebpf.mapped_array import MappedArray, map_entries
from tcpexporter.ebpf.ranges import RANGE_SLOTS

WINDOW = 8192
"""Number of slots that are mapped and read at once: 512 KiB of records, 64 KiB of words.

Both are whole pages of every size: arm64 has pages of 4, 16 or 64 KiB.
"""

UNTOUCHED = 16 * RANGE_SLOTS
"""Reading ends after this number of consecutive slots that were never used.

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
    """Each identifies a connection in its slot."""
    netns: npt.NDArray[np.uint32]
    is_seed: npt.NDArray[np.bool_]

    @property
    def established_ns(self) -> npt.NDArray[np.uint64]:
        """The times of the connections."""
        return times_ns(self.words)

    def only(self, chosen: npt.NDArray[np.bool_]) -> "Known":
        """Return the connections for which ``chosen`` is true."""
        return Known(*(getattr(self, each.name)[chosen] for each in fields(self)))


class ConnectionArray:
    """The slots of connections: their records, words and clients, in one array map each.

    Counting reads words and clients, which stay mapped. Records are mapped only while they
    are used, because the kernel charges mapped pages to the process.
    """

    def __init__(
        self,
        records: int,
        words: int,
        slots: int,
        record: "np.dtype[np.void]" = CONNECTION,
        *,
        clients: int | None = None,
    ) -> None:
        """Use the descriptors of the maps, which the caller keeps open.

        Args:
            records: of the map of records.
            words: of the map of words.
            slots: the length of each map.
            record: the dtype of a record.
            clients: of the map of clients; None: clients are not counted.

        Raises:
            OSError: the kernel refuses to reserve addresses.
        """
        self._slots = slots
        self._descriptor = records
        self._record = record
        self._used = WINDOW
        """Number of slots to read: those ever used, and at least `UNTOUCHED` after them."""
        self._words = MappedArray(words, np.dtype("u8"), slots, WINDOW)
        self._clients = (
            None if clients is None else MappedArray(clients, np.dtype("u8"), slots, WINDOW)
        )

    def words(self) -> Words:
        """Return the words of all slots that were ever used, and of some after them.

        Raises:
            OSError: the kernel refuses to map them.
        """
        while self._used < self._slots:
            words = self._words.upto(self._used)
            if not words[-UNTOUCHED:].any():
                return words
            self._used = len(words) + WINDOW
        return self._words.upto(self._slots)

    def word_windows(self) -> Iterator[Words]:
        """Yield the words that `words` returns, in chunks of `WINDOW`.

        Raises:
            OSError: the kernel refuses to map them.
        """
        words = self.words()
        for first in range(0, len(words), WINDOW):
            yield words[first : first + WINDOW]

    def chunk(self) -> Chunk:
        """Return the words and clients of the slots that `words` returns.

        Raises:
            OSError: the kernel refuses to map them.
        """
        words = self.words()
        if self._clients is None:
            return Chunk(words)
        return Chunk(words, self._clients.upto(len(words)))

    def put_clients(self, slots: Slots, clients: Clients) -> None:
        """Store the clients of slots; ignored if clients are not counted.

        Raises:
            OSError: the kernel refuses to map them.
        """
        if self._clients is not None:
            self._clients.upto(int(slots.max()) + 1)[slots] = clients

    def windows(self) -> Iterator[tuple[Records, Words]]:
        """Yield records and words of the slots that `words` returns, in chunks of `WINDOW`.

        Raises:
            OSError: the kernel refuses to map them.
        """
        for at, words in enumerate(self.word_windows()):
            yield self._records(at, words), words

    def words_upto(self, slots: int) -> Words:
        """Return the words of at least the first ``slots`` slots.

        Raises:
            OSError: the kernel refuses to map them.
        """
        return self._words.upto(slots)

    def records_of(self, slots: Slots) -> tuple[Records, Slots]:
        """Return the records of whole windows, and the index in them of each of ``slots``.

        Raises:
            OSError: the kernel refuses to map them.
        """
        first = int(slots.min()) // WINDOW * WINDOW
        last = min(int(slots.max()) // WINDOW * WINDOW + WINDOW, self._slots)
        return self._mapped(first, last), slots - np.uint32(first)

    def used(self) -> tuple[Records, Words]:
        """Return the records and words of the slots that `words` returns.

        Raises:
            OSError: the kernel refuses to map them.
        """
        words = self.words()
        return self._mapped(0, len(words)), words

    def _records(self, at: int, words: Words) -> Records:
        """Return the records of a window; ``at`` is its index, ``words`` has its words."""
        return self._mapped(at * WINDOW, at * WINDOW + len(words))

    def _mapped(self, first: int, last: int) -> Records:
        return map_entries(self._descriptor, self._record, first, last)

    def known(self) -> Known:
        """Return all connections; those that change meanwhile may be missing.

        All earlier loads of this thread come first: a memory barrier orders them.

        Raises:
            OSError: the kernel refuses to map the arrays.
        """
        memory_barrier()
        return _joined(
            _known(*window, at * WINDOW) for at, window in enumerate(self.windows())
        )

    def reported(self, seeds: Slots) -> Known:
        """Return the connections that are not seeds, as `known` does.

        At a start, nearly all slots have seeds, and most windows have seeds alone.

        Args:
            seeds: slots of seeds, open or closed. The program writes no other connection
                to them.

        Raises:
            OSError: the kernel refuses to map the arrays.
        """
        memory_barrier()
        seeds_in = np.bincount(seeds // WINDOW, minlength=self._slots // WINDOW + 1)
        found = []
        for at, words in enumerate(self.word_windows()):
            if at and seeds_in[at] == WINDOW:
                continue
            records = self._records(at, words)
            # The first window always, so that there is something to concatenate.
            if not at or _has_reported(records, words):
                found.append(_known(records, words, at * WINDOW))
        known = _joined(found)
        return known.only(~known.is_seed)


def old_windows(array: MappedArray, slots: int) -> Iterator[Records]:
    """Yield the used part of an array of version 1 of the layout, in chunks of `WINDOW`.

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


def _joined(windows: Iterable[tuple[npt.NDArray[Any], ...]]) -> Known:
    """Return the connections of several results of `_known`."""
    return Known(*(np.concatenate(each) for each in zip(*windows, strict=True)))


def _has_reported(window: Records, words: Words) -> bool:
    """Return whether a window has a connection that is not a seed."""
    is_reported = window["handle"] & HANDLE_SEEDED == 0
    is_reported &= words & np.uint64(SERIES_MASK) != 0
    return bool(is_reported.any())


def _known(
    window: Records, words: Words, first: int
) -> tuple[
    Slots,
    Hashes,
    Words,
    npt.NDArray[np.uint32],
    npt.NDArray[np.bool_],
]:
    """Return the fields of `Known` for a window that begins at the slot ``first``."""
    at, found, fields = consistent_fields(window, words, "key", "handle")
    slots = at.astype(np.uint32) + np.uint32(first)
    is_seed = fields["handle"] & HANDLE_SEEDED != 0
    netns = fields["key"]["netns"].copy()
    return slots, hashes(fields["key"]), found, netns, is_seed
