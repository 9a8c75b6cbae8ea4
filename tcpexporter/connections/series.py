# SPDX-License-Identifier: GPL-3.0-only
"""The series that connections are counted in, and what has happened in each of them."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import SERIES_FIRST, OutboundPort, Parts
from tcpexporter.connections.record import Numbers, Records, ip_versions
from tcpexporter.connections.sets import distinct, is_in

SERIES = np.dtype(
    [
        ("cgroup", ">u8"),
        ("netns", ">u4"),
        ("port", ">u2"),
        ("flags", "u1"),
        ("ip_version", "u1"),
    ]
)
"""``struct series_key``: what is counted separately.

A field is 0 if its part is not counted separately; in the kernel ``ip_version`` is never 0.
``cgroup`` is the number of the cgroup; in an exposition, that of its owner. ``netns`` is
the inode of the network namespace. ``flags`` has the bits below.

np.concatenate changes the byte order of the fields: concatenate `Series` instead.
"""

SERIES_BYTES = np.dtype(f"S{SERIES.itemsize}")

OUTBOUND = 1
"""The connections are outbound."""
REMOTE_PORT = 2
"""``port`` is the remote port."""
OWN = 8
"""The connections are those of the exporter's own listener, which are not counted."""
FOLDED = 4
"""The series adds up connections of other series; ``port`` is 0."""

Series: TypeAlias = npt.NDArray[np.bytes_]
"""An array of `SERIES`, viewed as `SERIES_BYTES`: numpy can sort and compare these."""

MULTIPLIER = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: spreads series over the table of `grouped`."""

TABLE_BITS = 16
"""The table of `grouped` has 2^16 elements."""

NO_SERIES = b""
"""A series whose bytes are all 0."""

COUNTERS = ("opened", "closed", "failed")


def series_of(connections: Records, parts: Parts) -> Series:
    """Return the series of each connection, as the BPF program determines it.

    Args:
        connections: of a dtype with the fields ``key``, ``is_outbound`` and ``cgroup``.
        parts: what is counted separately.
    """
    key = connections["key"]
    is_outbound = connections["is_outbound"] != 0
    series = np.zeros(len(connections), SERIES)
    series["ip_version"] = ip_versions(key)
    flags, port = OUTBOUND, key["local_port"]
    if parts.outbound_port == OutboundPort.REMOTE:
        flags |= REMOTE_PORT
        port = np.where(is_outbound, key["remote_port"], port)
    elif parts.outbound_port == OutboundPort.NONE:
        port = np.where(is_outbound, np.uint16(0), port)
    own_netns, own_port = parts.own_listener
    is_own = (key["local_port"] == own_port) & (key["netns"] == own_netns)
    inbound = np.where(is_own, np.uint8(OWN), np.uint8(0))
    series["flags"] = np.where(is_outbound, np.uint8(flags), inbound)
    series["port"] = port
    if parts.by_netns:
        series["netns"] = key["netns"]
    if parts.by_cgroup:
        series["cgroup"] = connections["cgroup"]
    return series.view(SERIES_BYTES)


def grouped(series: Series) -> tuple[Series, npt.NDArray[np.intp]]:
    """Return each series once, in ascending order, and the index in it of each element.

    Many connections usually have few series. Then sorting all of them would take ten times
    as long.
    """
    words = series.view(np.uint64).reshape(-1, SERIES.itemsize // 8)
    mixed = words[:, 0] ^ (words[:, 1] * np.uint64(MULTIPLIER))
    place = (mixed >> np.uint64(64 - TABLE_BITS)).view(np.int64)
    table = np.zeros(1 << TABLE_BITS, np.intp)
    every = np.arange(len(series))
    table[place] = every
    # If the table has an element of another series, the element represents itself.
    like = table[place]
    like = np.where((words == words[like]).all(axis=1), like, every)
    is_taken = np.zeros(len(series), np.bool_)
    is_taken[like] = True
    taken = series[is_taken]
    found = distinct(taken)
    number = np.searchsorted(found, taken)
    return found, number[(np.cumsum(is_taken) - 1)[like]]


def folded_series() -> Series:
    """Return the series of the numbers 0 to SERIES_FIRST - 1; number 0 has none."""
    series = np.zeros(SERIES_FIRST, SERIES)
    series["ip_version"] = 0, 4, 6, 4, 6
    series["flags"] = 0, FOLDED, FOLDED, FOLDED | OUTBOUND, FOLDED | OUTBOUND
    return series.view(SERIES_BYTES)


def folded_number(series: Series) -> Numbers:
    """Return the number of the folded series that counts each series without a number."""
    fields = series.view(SERIES)
    is_outbound = (fields["flags"] & OUTBOUND).astype(np.uint32)
    return np.where(fields["ip_version"] == 6, np.uint32(2), np.uint32(1)) + 2 * is_outbound


def bucket_count(bounds: Sequence[float]) -> int:
    """Return the number of lifetime buckets with these bounds; without bounds it is 0."""
    return len(bounds) + 1 if bounds else 0


def entry_dtype(buckets: int) -> "np.dtype[np.void]":
    """Return the dtype of ``struct ledger_entry`` with this number of lifetime buckets.

    ``series`` is `NO_SERIES` if the number is free. `COUNTERS` follow it. If ``buckets`` is
    not 0, so do ``lifetimes_sum``, in units of time as in a word, and ``lifetimes``, which
    are not cumulative.
    """
    return np.dtype([("series", SERIES_BYTES), *_counters(buckets)])


def correction_dtype(buckets: int) -> "np.dtype[np.void]":
    """Return the dtype of ``struct ledger_entry`` in the map of corrections.

    It is that of `entry_dtype`, with ``pre_existing`` and a zero in place of ``series``.
    """
    return np.dtype([("pre_existing", "u8"), ("zero", "u8"), *_counters(buckets)])


def _counters(buckets: int) -> list[tuple[str, str, tuple[int, ...]]]:
    of_closed = [("lifetimes_sum", "u8", ()), ("lifetimes", "u8", (buckets,))]
    return [*((each, "u8", ()) for each in COUNTERS), *(of_closed if buckets else [])]


@dataclass(frozen=True)
class Ledger:
    """What has happened in each series; all arrays have one row for each series number."""

    series: Series
    """`NO_SERIES`: the number is free."""
    opened: npt.NDArray[np.int64]
    """Connections that were established."""
    closed: npt.NDArray[np.int64]
    """Connections that have left the state ESTABLISHED."""
    failed: npt.NDArray[np.int64]
    """Outbound attempts that ended before ESTABLISHED."""
    pre_existing: npt.NDArray[np.int64]
    """Connections that were open at the start, so they are not among ``opened``."""
    lifetimes_sum: npt.NDArray[np.int64]
    """Of the closed connections, in units of 2^13 ns; all 0 without lifetimes."""
    lifetimes: npt.NDArray[np.int64]
    """Closed connections by lifetime, not cumulative; of shape (numbers, buckets)."""


class Forgotten:
    """The series to forget, by the values of a field."""

    def __init__(self) -> None:
        self._values: dict[str, frozenset[int]] = {}
        self._taken: dict[str, frozenset[int]] = {}
        """What the last `take` has cleared."""
        self._changing = threading.Lock()

    def add(self, field: str, values: Iterable[int]) -> None:
        """Add series to forget; any thread may call this."""
        with self._changing:
            self._values[field] = self._values.get(field, frozenset()) | {*values}

    def take(self, series: Series) -> npt.NDArray[np.bool_]:
        """Return whether each of these series is to be forgotten, and clear the values."""
        with self._changing:
            self._taken, self._values = self._values, {}
        found = np.zeros(len(series), np.bool_)
        for field, values in self._taken.items():
            found |= is_in(series.view(SERIES)[field], [*values])
        return found

    @contextlib.contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Add the values again that the block takes, if the block fails."""
        self._taken = {}
        try:
            yield
        except BaseException:
            for field, values in self._taken.items():
                self.add(field, values)
            raise
