# SPDX-License-Identifier: GPL-3.0-only
"""A tracker in the test's process, and socket tables that act between their dumps."""

import socket
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.parts import SECRET, TIME_SHIFT, Direction, Parts
from tcpexporter.connections.record import (
    CONNECTION,
    KEY,
    SOCKET,
    Records,
    Words,
    times_ns,
    words,
)
from tcpexporter.connections.record import numbers as numbers_of
from tcpexporter.connections.series import series_of
from tcpexporter.connections.source import INBOUND
from tcpexporter.ebpf import loading
from tcpexporter.ebpf.connection_array import HANDLE_SEEDED
from tcpexporter.ebpf.free_numbers import Slots
from tcpexporter.ebpf.loader_protocol import MAX_SERIES, Descriptors, Request
from tcpexporter.ebpf.runs import Runs
from tcpexporter.ebpf.series_numbers import SeriesNumbers
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.host import namespaces
from tcpexporter.socket_tables.tables import open_tables
from tests.support import Peers, reset

SLOTS = 1021
"""The default number of slots of a tracker."""


SEEN = np.dtype(
    [
        ("established_ns", "u8"),
        ("handle", "u8"),
        ("key", KEY),
        ("is_outbound", "u4"),
        ("cgroup", "u8"),
    ]
)
"""A connection of a tracker, with its time in ns."""


def attach(
    max_connections: int = SLOTS,
    *,
    parts: Parts = INBOUND,
    max_series: int = MAX_SERIES,
    bounds_s: Sequence[float] = (),
    lose_one_in: int = 0,
    without: tuple[str, ...] = (),
) -> Tracker:
    """Load the program for this namespace, and return a tracker that is not seeded."""
    request = Request(
        max_connections,
        0 if parts.by_netns else namespaces.inode(),
        SECRET,
        max_series=max_series,
        outbound_port=parts.outbound_port,
        lifetime_bounds=tuple(round(each * 1e9) >> TIME_SHIFT for each in bounds_s),
        lose_one_in=lose_one_in,
        without=without,
        client_masks=parts.client_masks,
        by_cgroup=parts.by_cgroup,
    )
    return tracker_of(loading.load(request), request, parts)


def tracker_of(
    descriptors: Descriptors,
    request: Request,
    parts: Parts = INBOUND,
    runs: Runs | None = None,
) -> Tracker:
    """Return a tracker for a program that was loaded as requested.

    Args:
        descriptors: of the program and its maps.
        request: what was requested.
        parts: what the program counts separately.
        runs: those of a previous tracker of this program; None: there was none.
    """
    runs = runs or Runs(descriptors)
    series = SeriesNumbers(descriptors, runs, request.max_series, request.lifetime_bounds)
    return Tracker(descriptors, request.max_connections, parts, series, runs)


def now_ns() -> int:
    """Return the present time, rounded as times of connections are."""
    return boottime_ns() >> TIME_SHIFT << TIME_SHIFT


class Dumps:
    """Socket tables; after each dump the next action of ``after`` is executed."""

    def __init__(self, *after: Callable[[], object], hidden_from: int = 0) -> None:
        self.taken = 0
        self._tables = open_tables("sock_diag", "self")
        self._after = list(after)
        self._hidden_from = hidden_from

    def established(self, *, with_ages: bool) -> Records:
        dump = self._tables.established(with_ages=with_ages)
        self.taken += 1
        if self._after:
            self._after.pop(0)()
        return dump[:0] if self.taken == self._hidden_from else dump

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()


def all_connections(tracker: Tracker) -> Records:
    """Return all connections of the tracker, both reported and seeded."""
    return np.concatenate([seen(*window) for window in tracker.read()])


def seen(records: Records, all_words: Words) -> Records:
    """Return the connections of slots, of dtype `SEEN`."""
    is_open = numbers_of(all_words) != 0
    there = records[is_open]
    found = np.zeros(len(there), SEEN)
    found["established_ns"] = times_ns(all_words[is_open])
    for name in ("handle", "key", "is_outbound", "cgroup"):
        found[name] = there[name]
    return found


def at_port(tracker: Tracker, port: int) -> Records:
    """Return the connections of a local port."""
    known = all_connections(tracker)
    here: Records = known[known["key"]["local_port"] == port]
    return here


def seeds(known: Records) -> Records:
    """Return the connections that came from the socket tables."""
    found: Records = known[known["handle"] & HANDLE_SEEDED != 0]
    return found


def invented(number: int, **key: object) -> Records:
    """Return records of invented connections, each with a different remote port."""
    connections = np.zeros(number, SOCKET)
    connections["key"]["local_port"] = 1
    connections["key"]["remote_port"] = np.arange(number)
    connections["key"]["netns"] = namespaces.inode()
    for field, value in key.items():
        connections["key"][field] = value
    connections["is_outbound"] = Direction.INBOUND
    return connections


def remove_records(tracker: Tracker, port: int) -> None:
    """Remove the connections of a local port, as if the tracker had missed their
    openings."""
    known = tracker.known()
    stale = np.isin(known.slots, slots_at(tracker, port))
    forgotten = known.only(stale)
    tracker.release(forgotten.slots, forgotten.words)


def slots_at(tracker: Tracker, port: int) -> Slots:
    """Return the slots of the connections of a local port."""
    known, all_words = tracker._used()
    is_here = (numbers_of(all_words) != 0) & (known["key"]["local_port"] == port)
    return np.flatnonzero(is_here).astype(np.uint32)


def words_at(tracker: Tracker, slots: Slots) -> Words:
    """Return the words of slots."""
    _, all_words = tracker._used()
    return all_words[slots]


def put_reported(tracker: Tracker, connections: Records) -> None:
    """Add connections to the tracker as if the kernel had reported them."""
    slots = tracker._allocate(len(connections))
    numbers = tracker.series.numbers(series_of(connections, tracker._parts))
    tracker.series.record_seeds(numbers, pre_existing=False)
    reported = np.zeros(len(connections), CONNECTION)
    for name in ("key", "is_outbound", "cgroup"):
        reported[name] = connections[name]
    # No socket has these handles: they are even, and not addresses of the kernel.
    reported["handle"] = 2 * (1 + np.arange(len(reported)))
    records, all_words = tracker._array.used()
    records[slots] = reported
    all_words[slots] = words(numbers, connections["established_ns"])
    for handle, slot in zip(reported["handle"], slots, strict=True):
        assert tracker._handles.put_new(handle, slot)


class Reusable:
    """A connection that can be closed and opened again with the same address pair."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.open()

    def open(self) -> None:
        self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.client.bind(("127.0.0.1", 61999))
        self.client.connect(("127.0.0.1", self._peers.port))
        self.server, _ = self._peers.listener.accept()

    def close(self) -> None:
        if self.client.fileno() < 0:
            return
        reset(self.client)
        self.server.close()

    def reopen(self) -> None:
        self.close()
        self.open()


def taken_slots(tracker: Tracker) -> Slots:
    """Return the slot of each handle that has one."""
    _, slots = tracker._handles.items(np.uint64, np.uint32)
    return slots


def free_slots(tracker: Tracker) -> Slots:
    """Return all slots on the stack of free slots."""
    slots = tracker._allocate(2 * tracker._slots)
    tracker._free(slots)
    return slots
