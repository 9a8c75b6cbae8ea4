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
    client_keys,
    numbers_of,
)
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import CLOSED, SERIES_BITS

Counters: TypeAlias = npt.NDArray[np.int64]

NUMBERS = 1 << SERIES_BITS
"""How many series numbers a connection can have; number 0 is that of no connection."""

PIECE = 32768
"""Number of slots that are read at once: they fit into the cache of a CPU."""


class Reading(NamedTuple):
    """The connections of each series number. Ignore number 0: it is that of no connection.

    The next reading changes `established` and `clients`.
    """

    established: npt.NDArray[np.int64]
    """All connections; of length `NUMBERS`."""
    younger: Sequence[Counters]
    """For each bound, those that are younger; the numbers after the last one have none."""
    times: npt.NDArray[np.int64]
    """The sum of the times at which they were established, in units of 2^13 ns, of length
    `NUMBERS`; empty if it was not requested. Pages that are never written to use no
    memory."""
    clients: SeenClients | None
    """Their clients; None: clients are not counted."""


class SlotCounts:
    """What the slots of a source add up to.

    It keeps the series number and the client of each slot. Between two scrapes only few of
    them change, and only these are counted again. So a reading requires neither sorting nor
    a loop over connections in Python. Its time does not depend on the number of series.
    """

    def __init__(self) -> None:
        self._pieces: list[ClientKeys] = []
        """The keys of at most `PIECE` slots each, as the last reading found them."""
        self._established = np.zeros(NUMBERS, np.int64)
        self._clients: ClientTable | None = None

    def read(
        self,
        chunks: Iterable[Chunk],
        since_ns: Sequence[int],
        *,
        long_term_ns: int | None,
        has_sums: bool,
    ) -> Reading:
        """Read all slots of a source.

        Args:
            chunks: of slots. Each is used only until the next one is requested. The kernel
                may write to it meanwhile.
            since_ns: times on CLOCK_BOOTTIME, the latest first; connections that were
                established after each of them are counted separately.
            long_term_ns: the one of ``since_ns`` that makes a connection long-term, if
                clients are to be counted.
            has_sums: whether to add up the times.
        """
        with self._reset_on_failure():
            limits = [first_young(each) for each in since_ns]
            younger: list[Counters] = [np.zeros(0, np.int64) for _ in limits]
            times = np.zeros(NUMBERS if has_sums else 0, np.int64)
            long_term_at = None
            if long_term_ns is not None:
                long_term_at = since_ns.index(long_term_ns)
                self._clients = self._clients or ClientTable()
            young: list[ClientKeys] = []
            pieces = 0
            for piece, clients in copies(chunks):
                words, keys = piece, client_keys(piece, clients)
                self._replace(pieces, keys)
                pieces += 1
                if has_sums:
                    units = (words >> np.uint64(SERIES_BITS)).view(np.int64)
                    np.add.at(times, numbers_of(keys), units)
                # The last bound first: only some of these are younger than an earlier one.
                for at, limit in reversed([*enumerate(limits)]):
                    is_younger = words >= limit
                    found = np.count_nonzero(is_younger)
                    if not found:
                        break
                    if found < len(words):  # selecting all of them would only copy them
                        chosen = np.flatnonzero(is_younger)
                        words, keys = words[chosen], keys[chosen]
                    younger[at] = _sum(younger[at], np.bincount(numbers_of(keys)))
                    if at == long_term_at:  # other bounds may have the same limit
                        young.append(keys)
            for at in range(pieces, len(self._pieces)):
                self._replace(at, self._pieces[at][:0])
            del self._pieces[pieces:]
            seen = None
            if self._clients:
                self._clients.merge(self._pieces)
                seen = SeenClients(self._clients, young)
            return Reading(self._established, younger, times, seen)

    @contextlib.contextmanager
    def _reset_on_failure(self) -> Iterator[None]:
        """Forget all slots if the block fails: then the next reading counts all of them."""
        try:
            yield
        except BaseException:
            # Allocate nothing: the block may have failed for lack of memory.
            self._pieces, self._clients = [], None
            self._established[:] = 0
            raise

    def _replace(self, at: int, keys: ClientKeys) -> None:
        """Replace the keys of a piece, and count its connections again where they differ.

        Args:
            at: the index of the piece.
            keys: the new keys. If there are fewer than before, the last slots of the piece
                have no connection.
        """
        if at == len(self._pieces):
            self._pieces.append(np.empty(0, np.uint64))
        piece = self._pieces[at]
        if len(keys) > len(piece):
            new = np.zeros(len(keys) - len(piece), np.uint64)
            self._pieces[at] = piece = np.concatenate((piece, new))
        self._change(piece[: len(keys)], keys)
        rest = piece[len(keys) :]
        if rest.any():
            self._change(rest, np.zeros(len(rest), np.uint64))

    def _change(self, before: ClientKeys, after: ClientKeys) -> None:
        changed = np.flatnonzero(before != after)
        if not len(changed):
            return
        old, new = before[changed], after[changed]
        np.subtract.at(self._established, numbers_of(old), np.int64(1))
        np.add.at(self._established, numbers_of(new), np.int64(1))
        if self._clients:
            self._clients.change(old, new)
        before[changed] = new


def _sum(one: Counters, other: Counters) -> Counters:
    """Add an array to another one in place; the shorter one lacks zeros at its end."""
    if len(one) < len(other):
        one, other = other, one
    one[: len(other)] += other
    return one


def copies(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield copies of all slots, in pieces; each is valid until the next one is requested.

    Pieces use the same memory until a larger one requires more. After large arrays have
    been freed, glibc returns their memory to the kernel; then each new page costs a page
    fault.
    """
    memory = np.empty((2, 0), np.uint64)
    for words, clients in chunks:
        size = min(len(words), PIECE)
        if memory.shape[1] < size:
            memory = np.empty((2, size), np.uint64)
        for first in range(0, len(words), PIECE):
            piece = words[first : first + PIECE]
            copied, copied_clients = memory[:, : len(piece)]
            np.copyto(copied, piece)
            if clients is None:
                yield Chunk(copied)
                continue
            memory_barrier()
            np.copyto(copied_clients, clients[first : first + PIECE])
            memory_barrier()
            # A slot whose word has changed may have the client of another connection.
            copied[np.flatnonzero(piece != copied)] = CLOSED
            yield Chunk(copied, copied_clients)


def first_young(since_ns: int) -> np.uint64:
    """Return the lowest word of a connection that was established after this time."""
    return np.uint64((since_ns >> TIME_SHIFT) + 1 << SERIES_BITS if since_ns >= 0 else 0)
