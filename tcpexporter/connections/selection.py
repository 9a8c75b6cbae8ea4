# SPDX-License-Identifier: GPL-3.0-only
"""Selects the connections that are counted, and the labels that distinguish series."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import NO_LISTENER, PORTS, Direction, has_owner
from tcpexporter.connections.record import LISTENER, Records
from tcpexporter.connections.series import (
    FOLDED,
    OUTBOUND,
    OWN,
    REMOTE_PORT,
    SERIES,
    SERIES_BYTES,
    Series,
)
from tcpexporter.connections.sets import distinct, is_in

Cgroups: TypeAlias = npt.NDArray[np.uint64]
"""Numbers of cgroups, or of their owners."""


class Owners(Protocol):
    """The owners of cgroups. Several cgroups can have the same one."""

    def numbers(self, cgroups: Cgroups) -> Cgroups:
        """Return the number of the owner of each cgroup, never 0.

        A cgroup without a known owner has `UNKNOWN_OWNER`. Its owner may be known later.
        """
        ...


UNKNOWN_OWNER = 1


class NoOwners:
    """Used if no label requires owners: each cgroup has `UNKNOWN_OWNER`."""

    def numbers(self, cgroups: Cgroups) -> Cgroups:
        return np.full(len(cgroups), UNKNOWN_OWNER, np.uint64)


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
    owners: Owners
    """Determines the owner labels."""

    @property
    def by_netns(self) -> bool:
        """Whether network namespaces are counted separately."""
        return "netns" in self.labels

    @property
    def by_owner(self) -> bool:
        """Whether owners are counted separately."""
        return has_owner(self.labels)


def select(
    ports: Sequence[int],
    *,
    tcpv6: bool,
    directions: Sequence[Direction],
    own_listener: tuple[int, int] = NO_LISTENER,
    labels: Sequence[str] = ("port", "tcp_version"),
    owners: Owners | None = None,
) -> Selection:
    """Return the selection for these settings; an empty ``ports`` selects all ports."""
    mask = np.zeros(PORTS, np.bool_)
    mask[list(ports) if ports else slice(None)] = True
    versions = (4, 6) if tcpv6 else (4,)
    chosen = tuple(directions)
    return Selection(
        mask, versions, chosen, own_listener, tuple(labels), owners or NoOwners()
    )


def is_selected(series: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return whether each series is selected; `NO_SERIES` is not."""
    fields = series.view(SERIES)
    selected: npt.NDArray[np.bool_] = selection.ports[fields["port"]] & is_in(
        fields["ip_version"], selection.ip_versions
    )
    selected &= is_in(fields["flags"] & OUTBOUND, selection.directions)
    selected &= fields["flags"] & OWN == 0
    return selected


def is_still_selected(published: Series, selection: Selection) -> npt.NDArray[np.bool_]:
    """Return whether each published series is selected after the ports have changed."""
    if not {"port", "remote_port"} & {*selection.labels}:
        return np.ones(len(published), np.bool_)
    selected: npt.NDArray[np.bool_] = selection.ports[published.view(SERIES)["port"]]
    return selected


def folding_steps(selection: Selection) -> list[str]:
    """Return the fields that a series is folded by, in order."""
    steps = []
    if {"port", "remote_port"} & {*selection.labels}:
        steps.append("port")
    if selection.by_owner:
        steps.append("cgroup")
    if selection.by_netns:
        steps.append("netns")
    return steps


def owners_of(series: Series, selection: Selection) -> Cgroups:
    """Return the number of the owner of each series; 0 if it is of no particular owner."""
    fields = series.view(SERIES)
    if not selection.by_owner:
        return np.zeros(len(series), np.uint64)
    owners = selection.owners.numbers(fields["cgroup"].astype(np.uint64))
    return np.where(fields["flags"] & FOLDED, np.uint64(0), owners)


def projected(series: Series, selection: Selection) -> Series:
    """Return the series without the fields that are not among the labels.

    The field ``cgroup`` of the result is the number of the owner, as in `owners_of`.
    """
    found = series.copy()
    fields = found.view(SERIES)
    labels = selection.labels
    if "remote_port" in labels:
        both = FOLDED | OUTBOUND
        fields["flags"][fields["flags"] & both == both] |= REMOTE_PORT
    is_local = fields["flags"] & REMOTE_PORT == 0
    if "tcp_version" not in labels:
        fields["ip_version"] = 0
    if "direction" not in labels:
        fields["flags"] &= np.uint8(~OUTBOUND & 0xFF)
    if "netns" not in labels:
        fields["netns"] = 0
    fields["cgroup"] = owners_of(series, selection)
    if "port" not in labels:
        fields["port"][is_local] = 0
        if not (selection.by_netns or selection.by_owner):
            # Now a folded series has the same labels as the others: they are one series.
            fields["flags"][is_local] &= np.uint8(~FOLDED & 0xFF)
    return found


def listened(listeners: Records, selection: Selection) -> Series:
    """Return the selected series of listeners, which are of dtype `LISTENER`."""
    own_netns, own_port = selection.own_listener
    is_own = (listeners["netns"] == own_netns) & (listeners["port"] == own_port)
    series = np.zeros(len(listeners), SERIES)
    series["ip_version"] = listeners["ip_version"]
    series["port"] = listeners["port"]
    series["netns"] = listeners["netns"]
    series["cgroup"] = listeners["cgroup"]
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
        found.append(np.zeros(1, SERIES_BYTES))
    return distinct(*found)


def _present(series: Records, selection: Selection) -> Series:
    """Return the distinct series that `projected` makes of the selected ones of ``series``.

    The flags of ``series`` are changed in place.
    """
    is_outbound = Direction.INBOUND not in selection.directions
    if is_outbound and not {"remote_port", "direction"} & {*selection.labels}:
        series["flags"] |= OUTBOUND  # so that listeners have series, as in the Go program
    found = series.view(SERIES_BYTES)
    found = found[is_selected(found, selection)]
    return distinct(projected(found, selection))
