# SPDX-License-Identifier: GPL-3.0-only
"""Counts connections by series number, and adds up the series that have equal labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import (
    PORTS,
    SERIES_BITS,
    SERIES_MASK,
    TIME_SHIFT,
    Direction,
    Records,
    Words,
)
from tcpexporter.connections.series import (
    FOLDED,
    OUTBOUND,
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

PIECE = 16384
"""Number of connections that are counted at once: they fit into the cache of a CPU."""


@dataclass(frozen=True)
class Selection:
    """Which connections and listeners are counted, and what distinguishes their series."""

    ports: npt.NDArray[np.bool_]
    """For each of the 65536 ports, whether it is selected."""
    ip_versions: Sequence[int]
    directions: Sequence[Direction]
    own_listener: tuple[int, int] | None
    """Namespace and port of the exporter's own listener, which is never selected.

    None if the exporter has no listener, or if its namespace is not counted.
    """
    labels: Sequence[str]
    """The labels of a series, in the order of an exposition."""

    by_netns: bool
    """Whether connections of more than one network namespace are read."""


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
        return Values(
            *(_sums(place, getattr(self, each.name), size) for each in fields(self))
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

    def only(self, chosen: npt.NDArray[np.intp]) -> "Counts":
        """Return the chosen series."""
        return Counts(self.series[chosen], self.values.only(chosen), self.total)


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] | None,
    labels: Sequence[str] = ("port", "tcp_version"),
    by_netns: bool = False,
) -> Selection:
    """Return the selection for these settings; an empty ``ports`` selects all ports."""
    mask = np.zeros(PORTS, np.bool_)
    mask[list(ports) if ports else slice(None)] = True
    versions = (4, 6) if tcpv6 else (4,)
    chosen = tuple(directions)
    return Selection(mask, versions, chosen, own_listener, tuple(labels), by_netns)


def kernel_parts(
    directions: Sequence[Direction], labels: Sequence[str], *, by_netns: bool
) -> Parts:
    """Return what a source has to count separately for a selection with these fields."""
    if Direction.OUTBOUND not in directions:
        outbound_port = OutboundPort.NONE
    elif "remote_port" in labels:
        outbound_port = OutboundPort.REMOTE
    else:
        outbound_port = OutboundPort.LOCAL
    return Parts(outbound_port, by_netns)


def count(
    chunks: Iterable[Words],
    ledger: Callable[[], Ledger],
    selection: Selection,
    since_ns: Sequence[int],
    *,
    now_ns: int | None = None,
) -> Counts:
    """Count the selected connections of all chunks.

    Args:
        chunks: arrays of ``series_and_time``. Each chunk is used only until the next one is
            requested. The kernel may write to it meanwhile.
        ledger: called when all chunks have been counted: so it has all their series.
        selection: which connections are counted.
        since_ns: times on CLOCK_BOOTTIME, the latest first. For each of them, `Values.ages`
            has how many connections were established then or before. None was before 0.
        now_ns: the present time on that clock, if ages are to be added up.
    """
    before = ledger().series
    bins, times = _tally(chunks, since_ns, has_sums=now_ns is not None)
    entries = ledger()
    series = entries.series
    established = bins[:, : len(series)].astype(np.int64)
    # A number that was freed meanwhile, and may be that of another series now, had no
    # connection any more when it was freed.
    has_changed = before[: len(series)] != series[: len(before)]
    has_changed &= before[: len(series)] != 0
    established[:, np.flatnonzero(has_changed)] = 0
    ages = established[::-1].cumsum(axis=0)[::-1]
    ages_sum = np.zeros(len(series), np.int64)
    if now_ns is not None:
        ages_sum = ages[0] * (now_ns >> TIME_SHIFT) - times[: len(series)]
    values = Values(
        ages[0],
        ages[1:].T,
        ages_sum,
        entries.opened,
        entries.closed,
        entries.failed,
        entries.pre_existing,
        entries.lifetimes_sum,
        entries.lifetimes,
    )
    chosen = np.flatnonzero(_is_selected(series, selection) & _is_used(values))
    merged, place = np.unique(projected(series[chosen], selection), return_inverse=True)
    summed = values.only(chosen).summed(place, len(merged))
    return Counts(merged, summed, int(ages[0, 1:].sum()))


def _tally(
    chunks: Iterable[Words], since_ns: Sequence[int], *, has_sums: bool
) -> tuple[npt.NDArray[np.int32], Counters]:
    """Count the connections of each series number by age, and add up their times.

    It neither sorts nor loops over connections in Python. It requires the same time for any
    number of series. Each connection is read once, as one word.

    Returns:
        The number of connections that are as old as none of the bounds, the first bound,
        the first two, and so on, of shape (bounds + 1, `NUMBERS`); and, for each number,
        the sum of the times at which they were established, in units of 2^13 ns. Pages that
        are never written to take no memory.
    """
    limits = [
        np.uint64((each >> TIME_SHIFT) + 1 << SERIES_BITS if each >= 0 else 0)
        for each in since_ns
    ]
    bins = np.zeros((len(limits) + 1) * NUMBERS, np.int32)
    times = np.zeros(NUMBERS, np.int64)
    for chunk in chunks:
        for first in range(0, len(chunk), PIECE):
            words = chunk[first : first + PIECE].copy()
            kinds = (words & np.uint64(SERIES_MASK)).view(np.int64)
            if has_sums:
                np.add.at(times, kinds, (words >> np.uint64(SERIES_BITS)).view(np.int64))
            for limit in limits:
                kinds += np.multiply(words < limit, NUMBERS, dtype=np.int64)
            np.add.at(bins, kinds, ONE)
    return bins.reshape(-1, NUMBERS), times


def _is_used(values: Values) -> npt.NDArray[np.bool_]:
    used: npt.NDArray[np.bool_] = (
        values.established | values.opened | values.failed | values.pre_existing
    ) != 0
    return used


def _is_selected(series: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return which series are selected; a free number (0) is not."""
    parts = series.view(SERIES)
    port, netns = parts["port"], parts["netns"]
    is_selected: npt.NDArray[np.bool_] = selection.ports[port] & np.isin(
        parts["ip_version"], selection.ip_versions
    )
    is_selected &= np.isin(parts["flags"] & OUTBOUND, selection.directions)
    if selection.own_listener is not None:
        own_netns, own_port = selection.own_listener
        is_own = (port == own_port) & (parts["flags"] & REMOTE_PORT == 0)
        is_selected &= ~is_own | ((netns != own_netns) & (netns != 0))
    return is_selected


def is_still_selected(published: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return which published series another selection of ports selects, too."""
    if not {"port", "remote_port"} & {*selection.labels}:
        return np.ones(len(published), np.bool_)
    is_selected: npt.NDArray[np.bool_] = selection.ports[published.view(SERIES)["port"]]
    return is_selected


def projected(series: Series, selection: Selection) -> Series:
    """Return the series without the parts that are not among the labels."""
    found = series.copy()
    parts = found.view(SERIES)
    labels = selection.labels
    if "tcp_version" not in labels:
        parts["ip_version"] = 0
    if "direction" not in labels:
        parts["flags"] &= np.uint8(~OUTBOUND & 0xFF)
    if "netns" not in labels:
        parts["netns"] = 0
    if "port" not in labels:
        parts["port"][parts["flags"] & REMOTE_PORT == 0] = 0
    if not _steps(selection):
        parts["flags"] &= np.uint8(~FOLDED & 0xFF)
    return found


def listened(listeners: Records, selection: Selection) -> Series:
    """Return the selected series of ``listeners``, of dtype `LISTENER`."""
    series = np.zeros(len(listeners), SERIES)
    series["ip_version"] = listeners["ip_version"]
    series["port"] = listeners["port"]
    if selection.by_netns:
        series["netns"] = listeners["netns"]
    return _present(series, selection)


def named(ports: Sequence[int], netns: int, selection: Selection) -> Series:
    """Return the selected series of ``ports`` in one namespace."""
    series = np.zeros((2, len(ports)), SERIES)
    series["port"] = np.array(ports, np.uint16)
    series["ip_version"] = [[4], [6]]
    if selection.by_netns:
        series["netns"] = netns
    outbound = series.copy()
    outbound["flags"] = OUTBOUND | REMOTE_PORT
    found = [_present(series.ravel(), selection)]
    if Direction.OUTBOUND in selection.directions and "remote_port" in selection.labels:
        found.append(_present(outbound.ravel(), selection))
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


def fold(
    counts: Counts,
    *,
    listening: Series,
    named: Series,
    published: Series,
    max_series: int,
    selection: Selection,
) -> tuple[Counts, int]:
    """Limit the number of series in an exposition.

    The connections of a series that is left out are added to a folded series, without port.
    There is one for each combination of the other labels, so the sums do not change. If
    there are more than ``max_series`` of these, the rest are added to the folded series for
    all other namespaces.

    Args:
        counts: the counts of all series.
        listening: the series that have a listener now.
        named: the series that are never left out.
        published: the series of the previous exposition, including folded ones. A series
            that is not in use any more stays, at 0, while there is capacity. A folded
            series always stays.
        max_series: the maximum number of series that are not folded, unless more are named.
        selection: what the series were selected and projected by.

    Returns:
        The counts of the exposition, and the number of series in use that are left out.
    """
    steps = _steps(selection)
    is_folded = published.view(SERIES)["flags"] & FOLDED != 0
    limit = max_series if steps else np.iinfo(np.int64).max
    kept = _kept(counts, listening, named, published[~is_folded], limit)
    used = np.union1d(counts.series, listening)
    folded = np.setdiff1d(used, kept, assume_unique=True)
    others = _others(folded, published[is_folded], max_series, steps)
    exposed = np.union1d(kept, others)
    place = np.searchsorted(exposed, _found(counts.series, exposed, steps))
    values = counts.values.summed(place, len(exposed))
    left_out = folded.view(SERIES)["flags"] & FOLDED == 0
    return Counts(exposed, values, counts.total), int(left_out.sum())


def _steps(selection: Selection) -> list[str]:
    """Return the fields that a series is folded by, in order."""
    steps = []
    if {"port", "remote_port"} & {*selection.labels}:
        steps.append("port")
    if "netns" in selection.labels:
        steps.append("netns")
    return steps


def _kept(
    counts: Counts, listening: Series, named: Series, published: Series, max_series: int
) -> Series:
    """Return the series that are not folded: those with the most connections.

    A listener counts as one connection, and is preferred among series of equal size.
    """
    is_own = counts.series.view(SERIES)["flags"] & FOLDED == 0
    counted = counts.series[is_own]
    series = np.unique(np.concatenate((counted, listening, named, published)))
    rank = np.zeros(len(series), np.int64)
    rank[np.searchsorted(series, counted)] = 4 * counts.values.established[is_own]
    rank[np.searchsorted(series, listening)] += 4 + 2
    # Among series of equal size, those of the previous exposition are preferred. So series
    # do not alternate between scrapes.
    rank[np.searchsorted(series, published)] += 1
    rank[np.searchsorted(series, named)] = np.iinfo(np.int64).max
    order = np.argsort(-rank, kind="stable")
    return np.sort(series[order[: max(max_series, len(named))]])


def _others(
    folded: Series, published: Series, max_series: int, steps: Sequence[str]
) -> Series:
    """Return the folded series: published ones, and those that ``folded`` needs."""
    if not steps:
        return np.empty(0, np.uint64)
    needed = np.setdiff1d(_without(steps[0], folded), published)
    others = np.concatenate((published, needed))
    is_shared = others.view(SERIES)["netns"] == 0
    own = others[~is_shared]
    shared = (others[is_shared], _without("netns", own[max_series:]))
    return np.unique(np.concatenate((own[:max_series], *shared)))


def _found(series: Series, exposed: Series, steps: Sequence[str]) -> Series:
    """Return the series of ``exposed`` that each of ``series`` is counted in.

    It is the series itself, or the folded one in its namespace, or the folded one for all
    other namespaces.
    """
    found = series
    for field in steps:
        found = np.where(np.isin(found, exposed), found, _without(field, found))
    return found


def _without(field: str, series: Series) -> Series:
    """Return ``series`` folded by a field."""
    blank = series.copy()
    blank.view(SERIES)[field] = 0
    blank.view(SERIES)["flags"] |= FOLDED
    return blank


def _sums(place: npt.NDArray[np.intp], rows: Counters, size: int) -> Counters:
    sums = np.zeros((size, *rows.shape[1:]), np.int64)
    if rows.size:
        np.add.at(sums, place, rows)
    return sums
