# SPDX-License-Identifier: GPL-3.0-only
"""Counts the connections of all slots by series number, beginning with the last counts."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import (
    Chunk,
    ClientKeys,
    ClientTable,
    SeenClients,
)
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import CLOSED, SERIES_BITS, SERIES_MASK, Words

Counters: TypeAlias = npt.NDArray[np.int64]

NUMBERS = 1 << SERIES_BITS
"""How many series numbers a connection can have; number 0 is that of no connection."""

PIECE = 32768
"""Number of slots that are read at once: they fit into the cache of a CPU."""


class Reading(NamedTuple):
    """The connections of each series number. Ignore number 0: it is that of no connection.

    The next reading changes `established`, `times` and `clients`.
    """

    established: npt.NDArray[np.int64]
    """All connections; of length `NUMBERS`."""
    younger: Sequence[Counters]
    """For each bound, those that are younger; the numbers after the last one have none."""
    times: npt.NDArray[np.int64]
    """The sum of the times at which they were established, in units of 2^13 ns; of length
    `NUMBERS`."""
    clients: SeenClients | None
    """Their clients; None: clients are not counted."""


class _Piece:
    """The slots that the last reading found in a piece of a chunk."""

    def __init__(self, *, has_clients: bool) -> None:
        none = np.empty(0, np.uint64)
        self.slots = Chunk(none, none if has_clients else None)
        self.latest = np.uint64(0)
        """No word is larger: no connection was established later."""

    def replace(self, chunk: Chunk) -> tuple[Chunk, Chunk]:
        """Replace all slots by those of a chunk.

        Returns:
            What the slots that have changed had before, and what they have now. Slots that
            the chunk does not have any more are in the former only.
        """
        size = len(chunk.words)
        before = self.slots.padded(size)
        changed = _differing(chunk, before.only(slice(size)))
        gone = np.arange(size, len(before.words))
        removed = before.only(np.concatenate((changed, gone)))
        added = _consistent(chunk, changed)
        self.slots = before.only(slice(size))
        self.slots.put(changed, added)
        self.latest = added.words.max(initial=self.latest)
        return removed, added


class SlotCounts:
    """What the slots of a source add up to.

    It keeps the word and the client of each slot. Between two scrapes only few of them
    change, and only these are counted again. So a reading requires neither sorting nor a
    loop over connections in Python. Its time does not depend on the number of series.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        """Of at most `PIECE` slots each."""
        # Pages of these that are never written to use no memory.
        self._established = np.zeros(NUMBERS, np.int64)
        self._times = np.zeros(NUMBERS, np.int64)
        self._clients: ClientTable | None = None

    def read(
        self,
        chunks: Iterable[Chunk],
        since_ns: Sequence[int],
        *,
        long_term_ns: int | None,
    ) -> Reading:
        """Read all slots of a source.

        Args:
            chunks: of slots. Each is used only until the next one is requested. The kernel
                may write to it meanwhile.
            since_ns: times on CLOCK_BOOTTIME, the latest first; connections that were
                established after each of them are counted separately.
            long_term_ns: the one of ``since_ns`` that makes a connection long-term, if
                clients are to be counted.
        """
        with self._reset_on_failure():
            limits = [first_young(each) for each in since_ns]
            younger: list[Counters] = [np.zeros(0, np.int64) for _ in limits]
            long_term_at = None
            if long_term_ns is not None:
                long_term_at = since_ns.index(long_term_ns)
                self._clients = self._clients or ClientTable()
            young: list[ClientKeys] = []
            read = 0
            for chunk in _in_pieces(chunks):
                piece = self._replace(read, chunk)
                read += 1
                slots = piece.slots
                # The last bound first: only some of these are younger than an earlier one.
                for at, limit in reversed([*enumerate(limits)]):
                    if piece.latest < limit:
                        break
                    is_younger = slots.words >= limit
                    if np.count_nonzero(is_younger) < len(is_younger):
                        slots = slots.only(np.flatnonzero(is_younger))
                    younger[at] = _sum(younger[at], np.bincount(_numbers(slots.words)))
                    if at == long_term_at:  # other bounds may have the same limit
                        young.append(slots.keys())
            for each in self._pieces[read:]:
                self._count(each.slots, -1)
            del self._pieces[read:]
            seen = None
            if self._clients:
                self._clients.merge(each.slots.keys() for each in self._pieces)
                seen = SeenClients(self._clients, young)
            return Reading(self._established, younger, self._times, seen)

    @contextlib.contextmanager
    def _reset_on_failure(self) -> Iterator[None]:
        """Forget all slots if the block fails: then the next reading counts all of them."""
        try:
            yield
        except BaseException:
            # Allocate nothing: the block may have failed for lack of memory.
            self._pieces, self._clients = [], None
            self._established[:] = 0
            self._times[:] = 0
            raise

    def _replace(self, at: int, chunk: Chunk) -> _Piece:
        """Replace the slots of a piece, and count again those that differ."""
        if at == len(self._pieces):
            self._pieces.append(_Piece(has_clients=chunk.clients is not None))
        removed, added = self._pieces[at].replace(chunk)
        self._count(removed, -1)
        self._count(added, 1)
        return self._pieces[at]

    def _count(self, slots: Chunk, step: int) -> None:
        """Add slots to the counts, or remove them: ``step`` is 1 or -1."""
        if not len(slots.words):
            return
        numbers = _numbers(slots.words)
        units = (slots.words >> np.uint64(SERIES_BITS)).view(np.int64)
        np.add.at(self._established, numbers, np.int64(step))
        np.add.at(self._times, numbers, units * step)
        if self._clients:
            self._clients.change(slots.keys(), step)


def _numbers(words: Words) -> npt.NDArray[np.int64]:
    return (words & np.uint64(SERIES_MASK)).view(np.int64)


def _sum(one: Counters, other: Counters) -> Counters:
    """Add an array to another one in place; the shorter one lacks zeros at its end."""
    if len(one) < len(other):
        one, other = other, one
    one[: len(other)] += other
    return one


def _in_pieces(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        for first in range(0, len(chunk.words), PIECE):
            yield chunk.only(slice(first, first + PIECE))


def _differing(slots: Chunk, known: Chunk) -> npt.NDArray[np.intp]:
    """Return the indices of the slots that differ from those of the last reading."""
    differs = slots.words != known.words
    if slots.clients is not None:
        # A slot can have another client and the same word: two seeds, or connections that
        # were established within 8 us.
        memory_barrier()
        differs |= slots.clients != known.clients
    return np.flatnonzero(differs)


def _consistent(slots: Chunk, chosen: npt.NDArray[np.intp]) -> Chunk:
    """Return a copy of the chosen slots; each client is that of the word."""
    words = slots.words[chosen]
    if slots.clients is None:
        return Chunk(words)
    memory_barrier()
    clients = slots.clients[chosen]
    memory_barrier()
    # A slot whose word has changed may have the client of another connection.
    words[slots.words[chosen] != words] = CLOSED
    return Chunk(words, clients)


def first_young(since_ns: int) -> np.uint64:
    """Return the lowest word of a connection that was established after this time."""
    return np.uint64((since_ns >> TIME_SHIFT) + 1 << SERIES_BITS if since_ns >= 0 else 0)
