# SPDX-License-Identifier: GPL-3.0-only
"""Connections to counts per namespace, local port and IP version; pure functions."""

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
"""What has a count of its own; ``netns`` is 0 where namespaces are not told apart.

``port`` is 0, which no socket has, for those of a namespace that are folded into
one; ``netns`` is 0 too for those of several namespaces.
"""

Series = npt.NDArray[np.uint64]
"""A sorted array of `SERIES`, each seen as one number."""

Kinds: TypeAlias = npt.NDArray[np.uint64]
"""The group of connections, whether they are long-term, and perhaps their namespace."""

IS_LONG_TERM = 1 << GROUP_BITS
ONE = np.int32(1)
"""Of the type of what it is added to: numpy is forty times as fast then."""

NOTHING = [0, IS_LONG_TERM]
"""Kinds of a place where no connection is."""

NETNS_SHIFT = 32

PIECE = 16384
"""Connections that are looked at at once: a CPU's cache has room for them."""

_Piece: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]


@dataclass(frozen=True)
class Selection:
    """Which connections and listeners are spoken of."""

    ports: npt.NDArray[np.bool_]
    """For each of the 65536, whether it is."""
    ip_versions: Sequence[int]
    directions: Sequence[Direction]
    own_listener: tuple[int, int] | None
    """Namespace and port that the exporter itself listens on: never spoken of. Where
    namespaces are not told apart all connections are of that one, or this is None."""
    by_netns: bool
    """Whether namespaces are told apart."""


@dataclass(frozen=True)
class Counts:
    """What is established now."""

    series: Series
    established: npt.NDArray[np.int64]
    """For each of ``series``."""
    long_term: npt.NDArray[np.int64]
    """Likewise."""
    total: int
    """Of all connections that were read, selected or not."""


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] | None,
    by_netns: bool = False,
) -> Selection:
    """A selection from what a user chose; no ``ports`` are all of them."""
    mask = np.zeros(PORTS, np.bool_)
    mask[list(ports) if ports else slice(None)] = True
    versions = (4, 6) if tcpv6 else (4,)
    return Selection(mask, versions, tuple(directions), own_listener, by_netns)


def count(
    chunks: Iterable[Records], selection: Selection, long_term_since_ns: int
) -> Counts:
    """Count the selected connections of all ``chunks``, of dtype `CONNECTION`.

    Args:
        chunks: each is done with before the next is asked for.
        selection: what is counted.
        long_term_since_ns: on CLOCK_BOOTTIME; a connection established then or
            before is long-term. Negative: none is.
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
    """What tells connections apart that are counted apart; no group: there is none.

    The kernel may write to them meanwhile: `tcpexporter.ebpf.tracker` says why ``group`` is
    read first.
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
    """Kinds of one namespace, or of all together, and how many there are of each.

    No sort and no Python loop over connections: 7 ns each, however many ports there are.
    """
    bins = np.zeros(2 * IS_LONG_TERM, np.int32)
    bins[NOTHING] = 1
    last_of = np.empty(2 * IS_LONG_TERM, np.int32)
    found = [np.empty(0, np.int64)]
    for kinds, _ in pieces:
        # Only those are looked at again in the end: the rest stays memory never touched.
        new = kinds[bins[kinds] == 0]
        number = np.arange(len(new), dtype=np.int32)
        last_of[new] = number
        found.append(new[last_of[new] == number])  # each once, without a sort
        np.add.at(bins, kinds, ONE)
    merged = np.concatenate(found)
    return merged.astype(np.uint64), bins[merged].astype(np.int64)


def _tally_by_netns(pieces: Iterator[_Piece]) -> tuple[Kinds, npt.NDArray[np.int64]]:
    """The same for each namespace."""
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
    """The selected series of ``listeners``, of dtype `LISTENER`."""
    series = _series(
        listeners["netns"], listeners["port"], listeners["ip_version"], selection
    )
    return np.unique(series[series != 0])


def named(ports: Sequence[int], netns: int, selection: Selection) -> Series:
    """The selected series of ``ports`` in one namespace."""
    listeners = np.zeros(len(ports) * 2, LISTENER)
    listeners["netns"] = netns
    listeners["port"] = np.repeat(np.array(ports, np.uint16), 2)
    listeners["ip_version"] = np.tile(np.array((4, 6), np.uint8), len(ports))
    return listened(listeners, selection)


def fold(
    counts: Counts, *, listening: Series, named: Series, published: Series, max_series: int
) -> tuple[Counts, int]:
    """The counts of one page, and how many series that are in use are not on it.

    What these have is added to a series with port 0, one for each IP version and
    namespace, so no sum changes. Beyond ``max_series`` of those, the rest are added
    to one of all namespaces.

    Args:
        counts: what is counted now.
        listening: what is listened on now.
        named: what is never folded.
        published: what was on the page before, with port 0 too. It is at 0 if it is not
            in use; with a port, only while there is room for it.
        max_series: how many are on the page with their port, unless more are named.
    """
    is_other = published.view(SERIES)["port"] == 0
    kept = _kept(counts, listening, named, published[~is_other], max_series)
    folded = np.setdiff1d(np.union1d(counts.series, listening), kept, assume_unique=True)
    others = _others(folded, published[is_other], max_series)
    page = np.union1d(kept, others)
    place = np.searchsorted(page, _found(counts.series, page))
    established, long_term = (
        _sums(place, numbers, len(page))
        for numbers in (counts.established, counts.long_term)
    )
    return Counts(page, established, long_term, counts.total), len(folded)


def _kept(
    counts: Counts, listening: Series, named: Series, published: Series, max_series: int
) -> Series:
    """The largest; a listener is worth a connection, and stays before its equals."""
    series = np.unique(np.concatenate((counts.series, listening, named, published)))
    rank = np.zeros(len(series), np.int64)
    rank[np.searchsorted(series, counts.series)] = 4 * counts.established
    rank[np.searchsorted(series, listening)] += 4 + 2
    # Only among equals, so that none comes and goes without a reason.
    rank[np.searchsorted(series, published)] += 1
    rank[np.searchsorted(series, named)] = np.iinfo(np.int64).max
    order = np.argsort(-rank, kind="stable")
    return np.sort(series[order[: max(max_series, len(named))]])


def _others(folded: Series, published: Series, max_series: int) -> Series:
    """With port 0: those that were published, and those that ``folded`` takes now."""
    taken = np.setdiff1d(_without("port", folded), published)
    others = np.concatenate((published, taken))
    is_shared = others.view(SERIES)["netns"] == 0
    own = others[~is_shared]
    shared = (others[is_shared], _without("netns", own[max_series:]))
    return np.unique(np.concatenate((own[:max_series], *shared)))


def _found(series: Series, page: Series) -> Series:
    """Each as it is on the page: itself, or its namespace's other, or that of all."""
    found = series
    for field in ("port", "netns"):
        found = np.where(np.isin(found, page), found, _without(field, found))
    return found


def _without(field: str, series: Series) -> Series:
    blank = series.copy()
    blank.view(SERIES)[field] = 0
    return blank


def _series(
    netns: npt.NDArray[np.uint32],
    port: npt.NDArray[np.uint16],
    ip_version: npt.NDArray[np.uint8],
    selection: Selection,
) -> Series:
    """Of each, 0 for what is not selected."""
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
    sums = np.zeros(size, np.int64)
    np.add.at(sums, place, numbers)
    return sums
