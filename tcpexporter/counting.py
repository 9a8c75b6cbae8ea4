# SPDX-License-Identifier: GPL-3.0-only
"""Connections to counts per local port and IP version; pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tcpexporter.connections import PORTS, Direction, Records, ip_versions

IP_VERSIONS = (4, 6)

PerPort = npt.NDArray[np.int64]
"""Of shape (2, 65536): IP version 4 and 6, local port."""

PortMask = npt.NDArray[np.bool_]
"""Of the same shape."""


@dataclass(frozen=True)
class Selection:
    """Which connections and listeners are spoken of."""

    mask: PortMask
    """By IP version and local port."""
    directions: Sequence[Direction]
    own_listener: tuple[int, int] | None
    """Network namespace and port that the exporter itself listens on."""


@dataclass(frozen=True)
class Counts:
    """What is established now."""

    established: PerPort
    long_term: PerPort
    total: int
    """Of all connections that were read, selected or not."""


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] | None,
) -> Selection:
    """A selection from what a user chose; no ``ports`` are all of them."""
    mask = np.zeros((len(IP_VERSIONS), PORTS), np.bool_)
    mask[:, list(ports) if ports else slice(None)] = True
    mask[1] &= tcpv6
    return Selection(mask, tuple(directions), own_listener)


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
    established = np.zeros(len(IP_VERSIONS) * PORTS, np.int64)
    long_term = np.zeros_like(established)
    total = 0
    for chunk in chunks:
        total += len(chunk)
        chosen = chunk[np.isin(chunk["value"]["direction"], selection.directions)]
        chosen = chosen[
            ~_is_own(chosen["key"]["netns"], chosen["key"]["local_port"], selection)
        ]
        place = _place(ip_versions(chosen["key"]), chosen["key"]["local_port"])
        established += np.bincount(place, minlength=len(established))
        if long_term_since_ns >= 0:
            is_old = chosen["value"]["established_ns"] <= long_term_since_ns
            long_term += np.bincount(place[is_old], minlength=len(established))
    shape = selection.mask.shape
    return Counts(
        np.where(selection.mask, established.reshape(shape), 0),
        np.where(selection.mask, long_term.reshape(shape), 0),
        total,
    )


def listened(listeners: Records, selection: Selection) -> PortMask:
    """The selected ports that are in ``listeners``, of dtype `LISTENER`."""
    others = listeners[~_is_own(listeners["netns"], listeners["port"], selection)]
    mask = np.zeros(selection.mask.size, np.bool_)
    mask[_place(others["ip_version"], others["port"])] = True
    return mask.reshape(selection.mask.shape) & selection.mask


def _is_own(
    netns: npt.NDArray[np.uint32], port: npt.NDArray[np.uint16], selection: Selection
) -> npt.NDArray[np.bool_]:
    if selection.own_listener is None:
        return np.zeros(len(port), np.bool_)
    own_netns, own_port = selection.own_listener
    is_own: PortMask = (port == own_port) & ((netns == own_netns) | (netns == 0))
    return is_own


def _place(
    versions: npt.NDArray[np.uint8], ports: npt.NDArray[np.uint16]
) -> npt.NDArray[np.intp]:
    return np.where(versions == 6, PORTS, 0) + ports.astype(np.intp)
