# SPDX-License-Identifier: GPL-3.0-only
"""Connections to counts per namespace, local port and IP version; pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tcpexporter.connections import LISTENER, PORTS, Direction, Records, ip_versions

SERIES = np.dtype([("ip_version", "u2"), ("port", "u2"), ("netns", "u4")])
"""What has a count of its own; ``netns`` is 0 where namespaces are not told apart."""

Series = npt.NDArray[np.uint64]
"""A sorted array of `SERIES`, each seen as one number."""


@dataclass(frozen=True)
class Selection:
    """Which connections and listeners are spoken of."""

    ports: npt.NDArray[np.bool_]
    """For each of the 65536, whether it is."""
    ip_versions: Sequence[int]
    directions: Sequence[Direction]
    own_listener: tuple[int, int] | None
    """Namespace and port that the exporter itself listens on: never spoken of."""
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
    total = 0
    found = [_count_chunk(np.empty(0, np.uint64), np.empty(0, np.bool_))]
    for chunk in chunks:
        total += len(chunk)
        chosen = chunk[np.isin(chunk["value"]["direction"], selection.directions)]
        key = chosen["key"]
        series = _series(key["netns"], key["local_port"], ip_versions(key), selection)
        is_selected = series != 0
        is_old = np.full(len(chosen), long_term_since_ns >= 0)
        is_old &= chosen["value"]["established_ns"] <= max(long_term_since_ns, 0)
        found.append(_count_chunk(series[is_selected], is_old[is_selected]))
    all_series, established, long_term = map(np.concatenate, zip(*found, strict=True))
    merged, place = np.unique(all_series, return_inverse=True)
    return Counts(
        merged,
        _sums(place, established, len(merged)),
        _sums(place, long_term, len(merged)),
        total,
    )


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


def _count_chunk(
    series: Series, is_old: npt.NDArray[np.bool_]
) -> tuple[Series, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    merged, place, established = np.unique(series, return_inverse=True, return_counts=True)
    return merged, established, _sums(place, is_old, len(merged))


def _sums(
    place: npt.NDArray[np.intp], numbers: npt.NDArray[np.int64 | np.bool_], size: int
) -> npt.NDArray[np.int64]:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, place, numbers)
    return sums
