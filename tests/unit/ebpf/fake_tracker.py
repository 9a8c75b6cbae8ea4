# SPDX-License-Identifier: GPL-3.0-only
"""A kernel in memory with sockets, socket tables and a tracker, to test without root.

`FakeTracker` implements `reconcile.TrackedConnections`. It is both the tracker and the BPF
program: its methods `opened` and `closed` handle events like bpf/tcp_tracker.c. A test
decides whether an event is missed, and when a socket's state is stored. It can also act
after each step of seeding or reconciling.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.identity import hashes
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import (
    CLOSED,
    CONNECTION,
    KEY,
    SOCKET,
    Records,
    Words,
    numbers,
    words,
)
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED, Known
from tcpexporter.ebpf.event_counters import Events
from tcpexporter.ebpf.free_numbers import Slots

NETNS = 4026531840
LOCAL_PORT = 443
NUMBER = np.uint32(7)
"""The number of the only series."""

Action = Callable[[], object]


@dataclass
class FakeSocket:
    """A TCP socket, which has been in state ESTABLISHED at least once."""

    address: int
    """The address of the kernel's struct, which is the handle of the connection."""
    key: Records
    """One record of dtype `KEY`."""
    is_established: bool = True
    """The state that the socket tables show."""


def new_time_ns() -> int:
    """Wait for the next unit of the times in words, and return its beginning in ns.

    So each time is later than all earlier events.
    """
    unit = boottime_ns() >> TIME_SHIFT
    while boottime_ns() >> TIME_SHIFT == unit:
        pass
    return boottime_ns() >> TIME_SHIFT << TIME_SHIFT


class NoRuns:
    """The runs of the fake program: each of its events is handled at once."""

    def wait(self) -> None:
        pass


class FakeTracker:
    """Connections in memory.

    ``after`` maps a step to an action that is executed once, after the step:

    - ``known``: the tracker was read.
    - ``handles``: the program finds the new seeds, and no reader counts them yet.
    - ``add``: the seeds are complete.
    - ``release``: a release has begun, and compares times next.
    """

    def __init__(self, *, slots: int = 97, max_closings: int = 101) -> None:
        self.runs = NoRuns()
        self.restored = 0
        self.seeds_refused = 0
        self.ledger: Counter[str] = Counter()
        """What has happened: ``opened``, ``closed``, and ``pre_existing``."""
        self.misses = False
        """Whether the kernel skips the program from now on; it counts each skipped
        event."""
        self.after: dict[str, Action] = {}
        self.connections = np.zeros(slots, CONNECTION)
        self.words = np.zeros(slots, np.uint64)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(slots))
        self._max_closings = max_closings
        self._is_recording = False
        self._closings: set[int] = set()
        self._events: Counter[str] = Counter()

    # The BPF program

    def opened(self, address: int, key: Records) -> None:
        """Handle an event: a socket enters ESTABLISHED."""
        if self._is_missed():
            return
        slot = self._slot_of.get(address)
        if slot is None:
            if not self._free:
                self._events["refused"] += 1
                return
            slot = self._slot_of[address] = self._free.pop(0)
        if self._is_open(slot):
            self._remove(slot)
        self._events["inserted"] += 1
        self.ledger["opened"] += 1
        self._write(slot, address, key)
        self.words[slot] = _word(new_time_ns())

    def closed(self, address: int, key: Records) -> None:
        """Handle an event: a socket leaves ESTABLISHED."""
        if self._is_missed():
            return
        slot = self._open_slot(address)
        is_known = slot is not None and self.connections["key"][slot] == key[0]
        if slot is not None:
            self._remove(slot)
        if is_known and not self._is_recording:
            return
        handle = _seed_handle(key)
        if self._is_recording:
            self._record_closing(handle)
        if not is_known and (seed := self._open_slot(handle)) is not None:
            self._remove(seed)

    def _is_missed(self) -> bool:
        self._events["missed"] += self.misses
        return self.misses

    def _record_closing(self, handle: int) -> None:
        if len(self._closings) < self._max_closings:
            self._closings.add(handle)
        else:
            self._events["unrecorded"] += 1

    def _open_slot(self, handle: int) -> int | None:
        slot = self._slot_of.get(handle)
        return slot if slot is not None and self._is_open(slot) else None

    def _is_open(self, slot: int) -> bool:
        return bool(numbers(self.words)[slot])

    def _remove(self, slot: int) -> None:
        self.words[slot] = CLOSED
        self._events["removed"] += 1
        self.ledger["closed"] += 1

    def _write(self, slot: int, handle: int, key: Records) -> None:
        self.connections["handle"][slot] = handle
        self.connections["key"][slot] = key[0]

    # TrackedConnections

    def known(self, *, with_seeds: bool = True) -> Known:
        slots = np.flatnonzero(numbers(self.words)).astype(np.uint32)
        found = self.connections[slots]
        known = Known(
            slots,
            hashes(found["key"]),
            self.words[slots],
            found["key"]["netns"].copy(),
            found["handle"] & HANDLE_SEEDED != 0,
        )
        self._then("known")
        return known if with_seeds else known.only(~known.is_seed)

    def is_balanced(self) -> bool:
        """Return whether opened - closed is open - pre-existing."""
        happened = self.ledger["opened"] - self.ledger["closed"]
        is_open = np.count_nonzero(numbers(self.words))
        return happened == is_open - self.ledger["pre_existing"]

    def add(self, seeds: Records, *, pre_existing: bool = False) -> Slots:
        added, new_words = [], []
        for seed in seeds:
            handle = _seed_handle(np.array([seed["key"]]))
            slot = self._slot_of.get(handle)
            if slot is not None:
                if self._is_open(slot):
                    continue
                self._forget(slot)
            if not self._free:
                self.seeds_refused += 1
                continue
            slot = self._slot_of[handle] = self._free.pop(0)
            self._write(slot, handle, np.array([seed["key"]]))
            added.append(slot)
            new_words.append(_word(int(seed["established_ns"])))
        self._then("handles")
        slots = np.array(added, np.uint32)
        self.words[slots] = new_words
        self.ledger[_added_as(pre_existing)] += len(slots)
        self._then("add")
        return slots

    @contextlib.contextmanager
    def recording_closings(self) -> Iterator[None]:
        self._closings.clear()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def release_closed(self, slots: Slots, *, pre_existing: bool = False) -> int:
        handles = self.connections["handle"][slots].tolist()
        has_closed = np.array([each in self._closings for each in handles], np.bool_)
        closed = slots[has_closed]
        released = self._release(closed, self.words[closed])
        self.ledger[_added_as(pre_existing)] -= released
        return released

    def release(self, slots: Slots, words: Words) -> int:
        released = self._release(slots, words)
        self.ledger["closed"] += released
        return released

    def _release(self, slots: Slots, words: Words) -> int:
        self._then("release")
        released = 0
        for slot, expected in zip(slots.tolist(), words.tolist(), strict=True):
            if self._is_open(slot) and self.words[slot] != expected:
                self.restored += 1
                continue
            released += self._is_open(slot)
            self._forget(slot)
        return released

    def _forget(self, slot: int) -> None:
        del self._slot_of[int(self.connections["handle"][slot])]
        self.words[slot] = CLOSED
        self.connections["handle"][slot] = 0
        self._free.append(slot)

    def reclaim(self) -> None:
        pass

    def events(self) -> Events:
        return Events(*(self._events[name] for name in Events._fields))

    def _then(self, step: str) -> None:
        if action := self.after.pop(step, None):
            action()


def _word(established_ns: int) -> np.uint64:
    found: np.uint64 = words(np.array([NUMBER]), np.array([established_ns], np.uint64))[0]
    return found


def _added_as(pre_existing: bool) -> str:
    return "pre_existing" if pre_existing else "opened"


def _seed_handle(key: Records) -> int:
    return int(hashes(key)[0] | HANDLE_SEEDED)


class FakeKernel:
    """Sockets, whose events go to one tracker."""

    def __init__(self, tracker: FakeTracker) -> None:
        self.tracker = tracker
        self.sockets: list[FakeSocket] = []

    def open(
        self,
        remote_port: int,
        *,
        address: int | None = None,
        netns: int = NETNS,
        is_missed: bool = False,
        is_stored: bool = True,
    ) -> FakeSocket:
        """Establish a connection.

        Args:
            remote_port: The only part of the key that differs between sockets.
            address: The address of a closed socket; None: a new one.
            netns: Inode of the network namespace.
            is_missed: Whether the kernel skips the BPF program.
            is_stored: Whether the socket tables show the new state already.
        """
        key = np.zeros(1, KEY)
        key["netns"], key["local_port"], key["remote_port"] = netns, LOCAL_PORT, remote_port
        address = address or 2 * (1 + len(self.sockets))
        opened = FakeSocket(address, key, is_stored)
        self.sockets.append(opened)
        with self._missing(is_missed):
            self.tracker.opened(opened.address, key)
        return opened

    def close(
        self, socket: FakeSocket, *, is_missed: bool = False, is_stored: bool = True
    ) -> None:
        """Close a connection: its socket leaves ESTABLISHED."""
        with self._missing(is_missed):
            self.tracker.closed(socket.address, socket.key)
        socket.is_established = not is_stored

    @contextlib.contextmanager
    def _missing(self, is_missed: bool) -> Iterator[None]:
        self.tracker.misses = is_missed
        yield
        self.tracker.misses = False


class FakeTables:
    """The socket tables of a `FakeKernel`; after each dump the next action happens."""

    def __init__(self, kernel: FakeKernel, *after: Action, hidden_from: int = 0) -> None:
        self.dumps = 0
        self._kernel = kernel
        self._after = list(after)
        self._hidden_from = hidden_from
        """The number of the dump that shows no socket."""

    def established(self, *, with_ages: bool) -> Records:  # noqa: ARG002
        self.dumps += 1
        shown = [each for each in self._kernel.sockets if each.is_established]
        if self.dumps == self._hidden_from:
            shown = []
        connections = np.zeros(len(shown), SOCKET)
        for at, each in enumerate(shown):
            connections["key"][at] = each.key[0]
        # These tables report no ages: each connection was active a moment ago.
        connections["established_ns"] = new_time_ns()
        if self._after:
            self._after.pop(0)()
        return connections

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.array([NETNS], np.uint32)
