# SPDX-License-Identifier: GPL-3.0-only
"""Counts connections by series number, and adds up the series that have equal labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk, ClientCounts, Seen, count_clients
from tcpexporter.connections.clients import seen as clients_of
from tcpexporter.connections.identity import ClientMasks
from tcpexporter.connections.record import (
    CLOSED,
    LISTENER,
    PORTS,
    SERIES_BITS,
    SERIES_MASK,
    TIME_SHIFT,
    Direction,
    Records,
)
from tcpexporter.connections.series import (
    FOLDED,
    NO_LISTENER,
    OUTBOUND,
    OWN,
    REMOTE_PORT,
    SERIES,
    Ledger,
    OutboundPort,
    Parts,
    Series,
)

Counters = npt.NDArray[np.int64]

ONE = np.int32(1)
"""1 in the dtype of the counters: np.add.at is forty times as fast with equal dtypes."""

NUMBERS = 1 << SERIES_BITS
"""How many series numbers a connection can have; number 0 is that of no connection."""

PIECE = 32768
"""Number of connections that are counted at once: they fit into the cache of a CPU."""


@dataclass(frozen=True)
class Selection:
    """Which connections and listeners are counted, and what distinguishes their series."""

    ports: npt.NDArray[np.bool_]
    """For each of the 65536 ports, whether it is selected."""
    ip_versions: Sequence[int]
    directions: Sequence[Direction]
    own_listener: tuple[int, int]
    """Namespace and port of the exporter's own listener, which is never selected."""
    labels: Sequence[str]
    """The labels of a series, in the order of an exposition."""

    @property
    def by_netns(self) -> bool:
        """Whether network namespaces are counted separately."""
        return "netns" in self.labels


@dataclass(frozen=True)
class Values:
    """What is published of each series; all arrays have one row for each series."""

    established: Counters
    """Connections that are established now."""
    ages: Counters
    """How many of them are at least as old as each bound; of shape (series, bounds)."""
    ages_sum: Counters
    """The sum of their ages, in units of 2^13 ns; 0 if ages are not counted."""
    opened: Counters
    closed: Counters
    failed: Counters
    pre_existing: Counters
    lifetimes_sum: Counters
    lifetimes: Counters
    """As in `Ledger`."""

    def summed(self, place: npt.NDArray[np.intp], size: int) -> "Values":
        """Return, for each place below ``size``, the sums of the rows that belong there."""
        is_distinct = bool(np.bincount(place, minlength=size).max(initial=0) <= 1)
        return Values(
            *(
                _sums(place, getattr(self, each.name), size, is_distinct=is_distinct)
                for each in fields(self)
            )
        )

    def only(self, chosen: npt.NDArray[Any]) -> "Values":
        """Return the chosen rows."""
        return Values(*(getattr(self, each.name)[chosen] for each in fields(self)))


@dataclass(frozen=True)
class Counts:
    """What is published of all series."""

    series: Series
    """In ascending order."""
    values: Values
    total: int
    """All connections that were read, selected or not."""
    rows: npt.NDArray[np.int64]
    """For each series number, the index of its series; -1: it is not counted."""
    seen: Sequence[Seen] | None = None
    """The clients of all connections, in pieces; None: clients are not counted."""

    def only(self, chosen: npt.NDArray[np.intp]) -> "Counts":
        """Return the chosen series."""
        place = np.full(len(self.series), -1)
        place[chosen] = np.arange(len(chosen))
        values = self.values.only(chosen)
        return Counts(self.series[chosen], values, self.total, self._rows(place), self.seen)

    def moved(self, series: Series, place: npt.NDArray[np.intp]) -> "Counts":
        """Return the sums by other series; ``place`` has the index of each present one."""
        values = self.values.summed(place, len(series))
        return Counts(series, values, self.total, self._rows(place), self.seen)

    def _rows(self, place: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return np.where(self.rows >= 0, np.append(place, -1)[self.rows], -1)

    def clients(self) -> ClientCounts | None:
        """Return the distinct clients of each series; None: they are not counted."""
        if self.seen is None:
            return None
        return count_clients(self.seen, self.rows, len(self.series))


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] = NO_LISTENER,
    labels: Sequence[str] = ("port", "tcp_version"),
) -> Selection:
    """Return the selection for these settings; an empty ``ports`` selects all ports."""
    mask = np.zeros(PORTS, np.bool_)
    mask[list(ports) if ports else slice(None)] = True
    versions = (4, 6) if tcpv6 else (4,)
    chosen = tuple(directions)
    return Selection(mask, versions, chosen, own_listener, tuple(labels))


def kernel_parts(
    directions: Sequence[Direction],
    labels: Sequence[str],
    own_listener: tuple[int, int] = NO_LISTENER,
    client_masks: ClientMasks | None = None,
) -> Parts:
    """Return what a source has to count separately for a selection with these fields."""
    if Direction.OUTBOUND not in directions:
        outbound_port = OutboundPort.NONE
    elif "remote_port" in labels:
        outbound_port = OutboundPort.REMOTE
    else:
        outbound_port = OutboundPort.LOCAL
    return Parts(outbound_port, "netns" in labels, own_listener, client_masks)


class Projection:
    """Adds up the series that are equal when only the labels of a selection are compared.

    It keeps what depends on the series alone: from scrape to scrape, they rarely change.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._series: Series = np.empty(0, np.uint64)
        self._chosen: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._merged: Series = np.empty(0, np.uint64)
        self._place: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._rows: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def of(
        self, series: Series, values: Values, *, total: int, seen: Sequence[Seen] | None
    ) -> Counts:
        """Return the counts of the series in use.

        Args:
            series: of each number; 0: the number is free.
            values: of each number.
            total: as in `Counts`.
            seen: as in `Counts`.
        """
        if not np.array_equal(series, self._series):
            self._series = series
            self._chosen = np.flatnonzero(_is_selected(series, self.selection))
            self._merged, self._place = np.unique(
                projected(series[self._chosen], self.selection), return_inverse=True
            )
            self._rows = np.full(len(series), -1)
            self._rows[self._chosen] = self._place
        summed = values.only(self._chosen).summed(self._place, len(self._merged))
        counts = Counts(self._merged, summed, total, self._rows, seen)
        is_used = summed.established | summed.opened | summed.failed | summed.pre_existing
        used = np.flatnonzero(is_used)
        return counts if len(used) == len(self._merged) else counts.only(used)


def count(
    chunks: Iterable[Chunk],
    ledger: Callable[[], Ledger],
    projection: Projection,
    since_ns: Sequence[int],
    *,
    now_ns: int | None = None,
    long_term_ns: int | None = None,
) -> Counts:
    """Count the selected connections of all chunks.

    Args:
        chunks: of slots, with those without a connection. Each chunk is used only until the
            next one is requested. The kernel may write to it meanwhile.
        ledger: called when all chunks have been counted: so it has all their series.
        projection: of the selection of connections that are counted.
        since_ns: times on CLOCK_BOOTTIME, the latest first. For each of them, `Values.ages`
            has how many connections were established then or before. None was before 0.
        now_ns: the present time on that clock, if ages are to be added up.
        long_term_ns: the one of ``since_ns`` that makes a connection long-term, if clients
            are to be counted.
    """
    before = ledger().series
    pieces = _copies(chunks)
    seen: list[Seen] | None = None
    if long_term_ns is not None:
        seen, limit = [], _limit(long_term_ns)
        pieces = _gathering(pieces, seen, limit)
    bins, times = _tally(pieces, since_ns, has_sums=now_ns is not None)
    entries = ledger()
    series = entries.series
    counted = bins[:, : len(series)].astype(np.int64)
    # A number that was freed meanwhile, and may be that of another series now, had no
    # connection any more when it was freed.
    has_changed = before[: len(series)] != series[: len(before)]
    has_changed &= before[: len(series)] != 0
    counted[:, np.flatnonzero(has_changed)] = 0
    established, younger = counted[0], counted[1:]
    ages_sum = np.zeros(len(series), np.int64)
    if now_ns is not None:
        ages_sum = established * (now_ns >> TIME_SHIFT) - times[: len(series)]
    values = Values(
        established,
        (established - younger).T,
        ages_sum,
        entries.opened,
        entries.closed,
        entries.failed,
        entries.pre_existing,
        entries.lifetimes_sum,
        entries.lifetimes,
    )
    total = int(established[1:].sum())
    return projection.of(series, values, total=total, seen=seen)


def _copies(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield copies of all slots, in pieces; each is valid until the next one is requested.

    All pieces use the same memory: after large arrays have been freed, glibc returns their
    memory to the kernel, and then each new page costs a page fault.
    """
    copies = np.empty((2, PIECE), np.uint64)
    for words, clients in chunks:
        for first in range(0, len(words), PIECE):
            piece = words[first : first + PIECE]
            copied, of = copies[:, : len(piece)]
            np.copyto(copied, piece)
            if clients is None:
                yield Chunk(copied)
                continue
            np.copyto(of, clients[first : first + PIECE])
            # A slot whose word has changed may have the client of another connection.
            copied[np.flatnonzero(piece != copied)] = CLOSED
            yield Chunk(copied, of)


def _gathering(
    pieces: Iterable[Chunk], into: list[Seen], limit: np.uint64
) -> Iterator[Chunk]:
    """Yield all pieces, and append their clients to ``into``."""
    for words, clients in pieces:
        if clients is not None:
            into.append(clients_of(words, clients, limit))
        yield Chunk(words, clients)


def _limit(since_ns: int) -> np.uint64:
    """Return the lowest word of a connection that was established after this time."""
    return np.uint64((since_ns >> TIME_SHIFT) + 1 << SERIES_BITS if since_ns >= 0 else 0)


def _tally(
    pieces: Iterable[Chunk], since_ns: Sequence[int], *, has_sums: bool
) -> tuple[npt.NDArray[np.int32], Counters]:
    """Count the connections of each series number by age, and add up their times.

    It neither sorts nor loops over connections in Python. It requires the same time for any
    number of series. Each connection is read once, as one word; those that are as old as
    the last bound are not looked at again.

    Returns:
        The number of all connections, and of those that are younger than each bound, of
        shape (bounds + 1, `NUMBERS`); and, for each number, the sum of the times at which
        its connections were established, in units of 2^13 ns. Pages that are never written
        to take no memory.
    """
    limits = [_limit(each) for each in since_ns]
    bins = np.zeros((len(limits) + 1, NUMBERS), np.int32)
    times = np.zeros(NUMBERS, np.int64)
    found, is_young = np.empty(PIECE, np.uint64), np.empty(PIECE, np.bool_)
    for piece, _ in pieces:
        words, masked = piece, found[: len(piece)]
        np.bitwise_and(words, np.uint64(SERIES_MASK), out=masked)
        numbers = masked.view(np.int64)
        np.add.at(bins[0], numbers, ONE)
        if has_sums:
            np.add.at(times, numbers, (words >> np.uint64(SERIES_BITS)).view(np.int64))
        # The last bound first: only some of these are younger than an earlier bound.
        for limit, younger in zip(reversed(limits), bins[:0:-1], strict=True):
            np.greater_equal(words, limit, out=is_young[: len(words)])
            chosen = np.flatnonzero(is_young[: len(words)])
            if not len(chosen):
                break
            words, numbers = words[chosen], numbers[chosen]
            np.add.at(younger, numbers, ONE)
    return bins, times


def _is_selected(series: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return which series are selected; a free number (0) is not."""
    parts = series.view(SERIES)
    is_selected: npt.NDArray[np.bool_] = selection.ports[parts["port"]] & np.isin(
        parts["ip_version"], selection.ip_versions
    )
    is_selected &= np.isin(parts["flags"] & OUTBOUND, selection.directions)
    is_selected &= parts["flags"] & OWN == 0
    return is_selected


def is_still_selected(published: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return which published series another selection of ports selects, too."""
    if not {"port", "remote_port"} & {*selection.labels}:
        return np.ones(len(published), np.bool_)
    is_selected: npt.NDArray[np.bool_] = selection.ports[published.view(SERIES)["port"]]
    return is_selected


def folding_steps(selection: Selection) -> list[str]:
    """Return the fields that a series is folded by, in order."""
    steps = []
    if {"port", "remote_port"} & {*selection.labels}:
        steps.append("port")
    if "netns" in selection.labels:
        steps.append("netns")
    return steps


def projected(series: Series, selection: Selection) -> Series:
    """Return the series without the parts that are not among the labels."""
    found = series.copy()
    parts = found.view(SERIES)
    labels = selection.labels
    if "remote_port" in labels:
        both = FOLDED | OUTBOUND
        parts["flags"][parts["flags"] & both == both] |= REMOTE_PORT
    is_local = parts["flags"] & REMOTE_PORT == 0
    if "tcp_version" not in labels:
        parts["ip_version"] = 0
    if "direction" not in labels:
        parts["flags"] &= np.uint8(~OUTBOUND & 0xFF)
    if "netns" not in labels:
        parts["netns"] = 0
    if "port" not in labels:
        parts["port"][is_local] = 0
        if "netns" not in labels:
            # The series with all ports is that of the folded ones.
            parts["flags"][is_local] &= np.uint8(~FOLDED & 0xFF)
    return found


def listened(listeners: Records, selection: Selection) -> Series:
    """Return the selected series of ``listeners``, of dtype `LISTENER`."""
    own_netns, own_port = selection.own_listener
    is_own = (listeners["netns"] == own_netns) & (listeners["port"] == own_port)
    series = np.zeros(len(listeners), SERIES)
    series["ip_version"] = listeners["ip_version"]
    series["port"] = listeners["port"]
    series["netns"] = listeners["netns"]
    series["flags"] = np.where(is_own, np.uint8(OWN), np.uint8(0))
    return _present(series, selection)


def named(ports: Sequence[int], netns: int, selection: Selection) -> Series:
    """Return the selected series of ``ports`` in one namespace."""
    listeners = np.zeros((2, len(ports)), LISTENER)
    listeners["netns"] = netns
    listeners["port"] = np.array(ports, np.uint16)
    listeners["ip_version"] = [[4], [6]]
    found = [listened(listeners.ravel(), selection)]
    if Direction.OUTBOUND in selection.directions and "remote_port" in selection.labels:
        series = np.zeros((2, len(ports)), SERIES)
        series["flags"] = OUTBOUND | REMOTE_PORT
        for name in ("ip_version", "port", "netns"):
            series[name] = listeners[name]
        found.append(_present(series.ravel(), selection))
    if not selection.labels:
        found.append(np.zeros(1, np.uint64))
    return np.unique(np.concatenate(found))


def _present(series: Records, selection: Selection) -> Series:
    """Return the series that exist without any connection."""
    is_outbound = Direction.INBOUND not in selection.directions
    if is_outbound and not {"remote_port", "direction"} & {*selection.labels}:
        series["flags"] |= OUTBOUND  # listeners have series, as in the Go program
    found = series.view(np.uint64)
    found = found[_is_selected(found, selection)]
    return np.unique(projected(found, selection))


def _sums(
    place: npt.NDArray[np.intp], rows: Counters, size: int, *, is_distinct: bool
) -> Counters:
    sums = np.zeros((size, *rows.shape[1:]), np.int64)
    if is_distinct:
        sums[place] = rows
    elif rows.size:
        np.add.at(sums, place, rows)
    return sums
