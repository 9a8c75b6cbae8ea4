# SPDX-License-Identifier: GPL-3.0-only
"""Derives from the settings what is counted, and starts the loader with that.

It does not import numpy, so that the loader starts early: see `startup`.
"""

from tcpexporter.config.settings import Settings
from tcpexporter.connections.parts import (
    NO_LISTENER,
    SECRET,
    Direction,
    Parts,
    client_masks,
    has_owner,
    kernel_parts,
    time_units,
)
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.loading import Loading
from tcpexporter.host import capacity, namespaces

DIRECTIONS = {
    "inbound": (Direction.INBOUND,),
    "outbound": (Direction.OUTBOUND,),
    "all": (Direction.INBOUND, Direction.OUTBOUND),
}


def begin_loading(settings: Settings) -> Loading:
    """Start the loader, which compiles, loads and attaches the BPF program.

    Returns:
        The running loader, which the caller closes.

    Raises:
        SettingsError: the network namespace does not exist.
        SourceError: the namespace cannot be seen, or the process cannot be started.
    """
    parts = parts_of(settings)
    return Loading(
        Request(
            settings.max_connections or capacity.max_connections(capacity.read_limits()),
            observed(settings.netns),
            SECRET,
            outbound_port=parts.outbound_port,
            by_netns=parts.by_netns,
            by_cgroup=parts.by_cgroup,
            own_listener=parts.own_listener,
            client_masks=parts.client_masks,
            lifetime_bounds=tuple(map(time_units, settings.bounds_s)),
        )
    )


def observed(netns: str) -> int:
    """Return the inode of the only network namespace that is observed; 0: all are.

    Args:
        netns: a network namespace for `namespaces.find`, or ``all``.

    Raises:
        SettingsError: the namespace does not exist.
        SourceError: the namespace cannot be seen.
    """
    return 0 if netns == "all" else namespaces.inode(namespaces.find(netns))


def parts_of(settings: Settings) -> Parts:
    """Return what is counted separately."""
    return kernel_parts(
        DIRECTIONS[settings.direction],
        settings.series_labels,
        own_listener(settings),
        client_masks(*settings.client_prefix) if settings.clients else None,
        by_cgroup=has_owners(settings),
    )


def own_listener(settings: Settings) -> tuple[int, int]:
    """Return the namespace and the port of the exporter's own listener."""
    return NO_LISTENER if settings.once else (namespaces.inode(), settings.listen_port)


def has_owners(settings: Settings) -> bool:
    """Return whether the owners of connections are required."""
    # Owners show which containers the namespaces belong to.
    return shows_owners(settings) or "netns" in settings.series_labels


def shows_owners(settings: Settings) -> bool:
    """Return whether labels or rules have the owners of connections."""
    return has_owner(settings.series_labels) or has_units(settings)


def has_units(settings: Settings) -> bool:
    """Return whether rules of --expect have a unit."""
    return any(each.unit for each in settings.expect)
