# SPDX-License-Identifier: GPL-3.0-only
"""Counts connections per network namespace, local port and IP version: pure functions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import (
    GROUP_BITS,
    GROUP_IPV6,
    LISTENER,
    PORTS,
    Direction,
    Records,
    directions,
)

SERIES = np.dtype([("ip_version", "u2"), ("port", "u2"), ("netns", "u4")])
"""A series: an IP version and a local port in a network namespace.

``netns`` is 0 if namespaces are not counted separately. ``port`` is 0 in a series that
other series of its namespace are folded into: no socket has port 0. Both are 0 in the
series for all other namespaces.
"""

Series = npt.NDArray[np.uint64]
"""A sorted array of series; each element is a `SERIES` viewed as a 64-bit number."""

Kinds: TypeAlias = npt.NDArray[np.uint64]
"""A kind of connection as one number: connections of one kind are counted together.

The number has the ``group`` of a connection and a bit for long-term. If namespaces are
counted separately, the bits from `NETNS_SHIFT` on are the namespace.
"""

IS_LONG_TERM = 1 << GROUP_BITS
ONE = np.int32(1)
"""1 in the dtype of the counters: np.add.at is forty times as fast with equal dtypes."""

NO_CONNECTION = [0, IS_LONG_TERM]
"""The kinds of a slot that has no connection."""

NETNS_SHIFT = 32

PIECE = 16384
"""Number of connections that are counted at once: they fit into the cache of a CPU."""

_Piece: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]


@dataclass(frozen=True)
class Selection:
    """The selection of connections and listeners to count."""

    ports: npt.NDArray[np.bool_]
    """For each of the 65536 ports, whether it is selected."""
    ip_versions: Sequence[int]
    directions: Sequence[Direction]
    own_listener: tuple[int, int] | None
    """Namespace and port of the exporter's own listener, which is never selected.

    None if the exporter has no listener, or if its namespace is not counted.
    """
    by_netns: bool
    """Whether namespaces are counted separately."""


@dataclass(frozen=True)
class Counts:
    """The numbers of connections that are established now."""

    series: Series
    established: npt.NDArray[np.int64]
    """Established connections of each of ``series``."""
    long_term: npt.NDArray[np.int64]
    """Long-term connections of each of ``series``."""
    total: int
    """All connections that were read, selected or not."""


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] | None,
    by_netns: bool = False,
) -> Selection:
    """Return the selection for these settings; an empty ``ports`` selects all ports."""
    mask = np.zeros(PORTS, np.bool_)
    mask[list(ports) if ports else slice(None)] = True
    versions = (4, 6) if tcpv6 else (4,)
    return Selection(mask, versions, tuple(directions), own_listener, by_netns)


def count(
    chunks: Iterable[Records], selection: Selection, long_term_since_ns: int
) -> Counts:
    """Count the selected connections of all chunks.

    Args:
        chunks: of dtype `CONNECTION` or `SOCKET`. Each chunk is used only until the next
            one is requested.
        selection: which connections are counted.
        long_term_since_ns: a time on CLOCK_BOOTTIME. A connection that was established then
            or before is long-term. If the time is negative, no connection is long-term.
    """
    tally = _tally_by_netns if selection.by_netns else _tally
    kinds, numbers = tally(_kinds(chunks, long_term_since_ns))
    group = (kinds & np.uint64(IS_LONG_TERM - 1)).astype(np.uint32)
    series = _series(
        (kinds >> np.uint64(NETNS_SHIFT)).astype(np.uint32),
        (group & np.uint32(PORTS - 1)).astype(np.uint16),
        np.where(group & np.uint32(GROUP_IPV6), np.uint8(6), np.uint8(4)),
        selection,
    )
    is_selected = (series != 0) & np.isin(directions(group), selection.directions)
    merged, place = np.unique(series[is_selected], return_inverse=True)
    chosen = numbers[is_selected]
    is_long_term = kinds[is_selected] & np.uint64(IS_LONG_TERM) != 0
    return Counts(
        merged,
        _sums(place, chosen, len(merged)),
        _sums(place, chosen * is_long_term, len(merged)),
        int(numbers.sum()),
    )


def _kinds(chunks: Iterable[Records], long_term_since_ns: int) -> Iterator[_Piece]:
    """Yield the kind and the namespace of each slot; a slot may have no connection.

    The kernel may write to the slots meanwhile: `tcpexporter.ebpf.tracker` argues why
    ``group`` is read before ``established_ns``.
    """
    since_ns = np.uint64(max(long_term_since_ns, 0))
    long_term = IS_LONG_TERM if long_term_since_ns >= 0 else 0
    for chunk in chunks:
        for first in range(0, len(chunk), PIECE):
            piece = chunk[first : first + PIECE]
            kinds = piece["group"].astype(np.int64)
            is_old = piece["established_ns"] <= since_ns
            kinds |= np.multiply(is_old, long_term, dtype=np.int64)
            yield kinds, piece["key"]["netns"]


def _tally(pieces: Iterator[_Piece]) -> tuple[Kinds, npt.NDArray[np.int64]]:
    """Return the kinds that occur, without namespaces, and how often each occurs.

    It neither sorts connections nor loops over them in Python. It takes 7 ns per
    connection, whatever the number of ports.
    """
    bins = np.zeros(2 * IS_LONG_TERM, np.int32)
    bins[NO_CONNECTION] = 1
    last_of = np.empty(2 * IS_LONG_TERM, np.int32)
    found = [np.empty(0, np.int64)]
    for kinds, _ in pieces:
        # Only the bins of kinds that occur are written and read. So the kernel allocates no
        # memory for the other bins.
        new = kinds[bins[kinds] == 0]
        number = np.arange(len(new), dtype=np.int32)
        last_of[new] = number
        found.append(new[last_of[new] == number])  # removes repetitions without a sort
        np.add.at(bins, kinds, ONE)
    merged = np.concatenate(found)
    return merged.astype(np.uint64), bins[merged].astype(np.int64)


def _tally_by_netns(pieces: Iterator[_Piece]) -> tuple[Kinds, npt.NDArray[np.int64]]:
    """Return the kinds that occur, with namespaces, and how often each occurs."""
    found = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
    for kinds, netns in pieces:
        is_there = kinds & (IS_LONG_TERM - 1) != 0
        there = kinds[is_there].astype(np.uint64)
        there |= netns[is_there].astype(np.uint64) << np.uint64(NETNS_SHIFT)
        found.append(np.unique(there, return_counts=True))
    everything, numbers = map(np.concatenate, zip(*found, strict=True))
    merged, place = np.unique(everything, return_inverse=True)
    return merged, _sums(place, numbers, len(merged))


def listened(listeners: Records, selection: Selection) -> Series:
    """Return the selected series of ``listeners``, of dtype `LISTENER`."""
    series = _series(
        listeners["netns"], listeners["port"], listeners["ip_version"], selection
    )
    return np.unique(series[series != 0])


def named(ports: Sequence[int], netns: int, selection: Selection) -> Series:
    """Return the selected series of ``ports`` in one namespace."""
    listeners = np.zeros(len(ports) * 2, LISTENER)
    listeners["netns"] = netns
    listeners["port"] = np.repeat(np.array(ports, np.uint16), 2)
    listeners["ip_version"] = np.tile(np.array((4, 6), np.uint8), len(ports))
    return listened(listeners, selection)


def fold(
    counts: Counts, *, listening: Series, named: Series, published: Series, max_series: int
) -> tuple[Counts, int]:
    """Limit the number of series in an exposition.

    The connections of a series that is left out are added to a series with port 0. Each
    namespace and IP version has such a series, so the sums do not change. If there are more
    than ``max_series`` such series, the rest are added to the series for all other
    namespaces.

    Args:
        counts: the counts of all series.
        listening: the series that have a listener now.
        named: the series that are never left out.
        published: the series of the previous exposition, including those with port 0. A
            series whose port is no longer in use stays, at 0, while ``max_series`` allows.
            A series with port 0 always stays.
        max_series: the maximum number of series with a port, unless more are named.

    Returns:
        The counts of the exposition, and the number of series in use that are left out.
    """
    is_other = published.view(SERIES)["port"] == 0
    kept = _kept(counts, listening, named, published[~is_other], max_series)
    folded = np.setdiff1d(np.union1d(counts.series, listening), kept, assume_unique=True)
    others = _others(folded, published[is_other], max_series)
    exposed = np.union1d(kept, others)
    place = np.searchsorted(exposed, _found(counts.series, exposed))
    established, long_term = (
        _sums(place, numbers, len(exposed))
        for numbers in (counts.established, counts.long_term)
    )
    return Counts(exposed, established, long_term, counts.total), len(folded)


def _kept(
    counts: Counts, listening: Series, named: Series, published: Series, max_series: int
) -> Series:
    """Return the series that keep their port: those with the most connections.

    A listener counts as one connection, and is preferred among series of equal size.
    """
    series = np.unique(np.concatenate((counts.series, listening, named, published)))
    rank = np.zeros(len(series), np.int64)
    rank[np.searchsorted(series, counts.series)] = 4 * counts.established
    rank[np.searchsorted(series, listening)] += 4 + 2
    # Among series of equal size, those of the previous exposition are preferred. So series
    # do not alternate between scrapes.
    rank[np.searchsorted(series, published)] += 1
    rank[np.searchsorted(series, named)] = np.iinfo(np.int64).max
    order = np.argsort(-rank, kind="stable")
    return np.sort(series[order[: max(max_series, len(named))]])


def _others(folded: Series, published: Series, max_series: int) -> Series:
    """Return the series with port 0: the published ones, and those for ``folded``."""
    taken = np.setdiff1d(_without("port", folded), published)
    others = np.concatenate((published, taken))
    is_shared = others.view(SERIES)["netns"] == 0
    own = others[~is_shared]
    shared = (others[is_shared], _without("netns", own[max_series:]))
    return np.unique(np.concatenate((own[:max_series], *shared)))


def _found(series: Series, exposed: Series) -> Series:
    """Return the series of ``exposed`` that each of ``series`` is counted in.

    That is the series itself if it is exposed, otherwise the series with port 0 in its
    namespace, otherwise the series for all other namespaces.
    """
    found = series
    for field in ("port", "netns"):
        found = np.where(np.isin(found, exposed), found, _without(field, found))
    return found


def _without(field: str, series: Series) -> Series:
    """Return ``series`` with a field set to 0."""
    blank = series.copy()
    blank.view(SERIES)[field] = 0
    return blank


def _series(
    netns: npt.NDArray[np.uint32],
    port: npt.NDArray[np.uint16],
    ip_version: npt.NDArray[np.uint8],
    selection: Selection,
) -> Series:
    """Return the series of each port; 0 for a port that is not selected."""
    series = np.zeros(len(port), SERIES)
    series["ip_version"] = ip_version
    series["port"] = port
    if selection.by_netns:
        series["netns"] = netns
    is_selected = selection.ports[port] & np.isin(ip_version, selection.ip_versions)
    if selection.own_listener is not None:
        own_netns, own_port = selection.own_listener
        is_selected &= (port != own_port) | ((netns != own_netns) & (netns != 0))
    return np.where(is_selected, series.view(np.uint64), np.uint64(0))


def _sums(
    place: npt.NDArray[np.intp], numbers: npt.NDArray[np.int64 | np.bool_], size: int
) -> npt.NDArray[np.int64]:
    """Return an array of ``size`` sums: at each index, the sum of the numbers for it."""
    sums = np.zeros(size, np.int64)
    np.add.at(sums, place, numbers)
    return sums
