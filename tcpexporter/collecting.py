# SPDX-License-Identifier: GPL-3.0-only
"""Opens the source of connections, and makes the collector that counts them."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tcpexporter.config.settings import Settings
from tcpexporter.connections.parts import NO_LISTENER
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import Source
from tcpexporter.ebpf.loading import Loading
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.errors import SettingsError, SourceError
from tcpexporter.host import cgroups, namespaces
from tcpexporter.metrics.collector import Choice, ConnectionCollector
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.request import (
    DIRECTIONS,
    begin_loading,
    has_owners,
    has_units,
    own_listener,
    parts_of,
    shows_owners,
)
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.tables import open_tables

if TYPE_CHECKING:  # imported only when it is used
    from tcpexporter.socket_tables.saved_ages import State

log = logging.getLogger("tcpexporter")

SOURCES = ("ebpf", "sock_diag", "procfs")
"""The sources, in the order in which ``--source auto`` tries them."""


class Counting(NamedTuple):
    """The source, the collector, and the objects that belong to them."""

    source: Source
    watch: namespaces.Watch | None
    """The watch of the namespace of --netns; None: that is ``self`` or ``all``."""
    choose: Callable[[Settings], Choice]
    """Makes the collector's choice from settings that may have been read again."""
    collector: ConnectionCollector
    cgroups: int | None = None
    """The descriptor of the top cgroup directory, which must stay listable; None: there
    is none."""


def open_counting(
    settings: Settings, resources: contextlib.ExitStack, loading: Loading | None = None
) -> Counting:
    """Open the source of connections, and make the collector that counts them.

    Args:
        settings: the settings of this run.
        resources: a stack that closes the opened objects at the end.
        loading: of `begin_loading` with these settings; None: the loader is started if the
            source requires it. It is closed when the program is loaded, or cannot be
            loaded. The caller closes it too, in case of an earlier error.

    Raises:
        TcpExporterError: the source, the state file or the namespace cannot be opened.
    """
    state = _open_state(settings.state) if settings.state else None
    source = open_source(settings, state, loading)
    resources.callback(source.close)
    if state:
        resources.callback(state.close)
    watch = namespaces.open_watch(settings.netns, source.namespaces)
    if watch:
        resources.callback(watch.close)
    paths = _open_cgroups(settings, resources)
    if shows_owners(settings) and source.name == "procfs":
        log.warning(
            "the owners of connections are not known: procfs does not show the cgroups of"
            " sockets, ebpf and sock_diag do"
        )
    owners = None
    if has_owners(settings):
        owners = OwnerNumbers(settings.series_labels, paths)
    choose = chooser(settings, source, owners)
    collector = make_collector(source, settings, choose(settings), owners)
    return Counting(source, watch, choose, collector, paths.descriptor if paths else None)


def _open_cgroups(
    settings: Settings, resources: contextlib.ExitStack
) -> cgroups.CgroupPaths | None:
    if not has_owners(settings):
        return None
    paths = cgroups.open_paths()
    if paths:
        resources.callback(paths.close)
    return paths


def _open_state(path: str) -> "State | None":
    # Imported only when it is used: it uses 0.3 MiB of memory.
    from tcpexporter.socket_tables.saved_ages import State  # noqa: PLC0415

    return State.open(Path(path))


def open_source(
    settings: Settings, state: "State | None" = None, loading: Loading | None = None
) -> Source:
    """Open the source that --source selects.

    Args:
        settings: the settings of this run.
        state: ages to restore and to save; None: ages are neither restored nor saved.
        loading: as for `open_counting`.

    Raises:
        SourceError: the named source, or with ``auto`` every source, does not work.
    """
    if settings.source != "auto":
        return _open_named_source(settings.source, settings, state, loading)
    reasons = []
    for name in SOURCES:
        try:
            source = _open_named_source(name, settings, state, loading)
        except SourceError as error:
            reasons.append(f"{name} does not work: {error}")
            continue
        if reasons:
            log.warning("polling %s, because %s", name, "; ".join(reasons))
        return source
    raise SourceError("; ".join(reasons))


def _open_named_source(
    name: str, settings: Settings, state: "State | None", loading: Loading | None
) -> Source:
    if name == "ebpf":
        with contextlib.closing(loading or begin_loading(settings)) as begun:
            return EbpfSource(
                begun,
                netns=settings.netns,
                parts=parts_of(settings),
                reconcile_interval_s=settings.reconcile_interval_s,
                reconcile_cpu_share=settings.reconcile_cpu_percent / 100,
                pin=settings.pin,
                state=state,
            )
    parts = parts_of(settings)
    return PollingSource(
        open_tables(name, settings.netns, with_cgroups=parts.by_cgroup),
        settings.interval_s,
        state,
        parts=parts,
        lifetime_bounds_s=settings.bounds_s,
    )


def chooser(
    settings: Settings, source: Source, owners: OwnerNumbers | None = None
) -> Callable[[Settings], Choice]:
    """Return the function that makes the collector's choice from settings read again.

    Only their ports, duration and rules can differ from ``settings``.
    """
    own_netns = namespaces.inode()
    listens_there = own_netns in source.namespaces()
    own = own_listener(settings) if listens_there else NO_LISTENER

    def choose(chosen: Settings) -> Choice:
        if has_units(chosen) and not owners:
            raise SettingsError(
                "a rule of --expect has unit=, and the owners of connections are not"
                " counted since the start: restart the exporter"
            )
        selection = select(
            chosen.ports,
            tcpv6=settings.tcpv6,
            directions=DIRECTIONS[settings.direction],
            own_listener=own,
            labels=settings.series_labels,
            owners=owners,
        )
        return Choice(
            selection,
            named(chosen.ports, own_netns, selection),
            chosen.duration_s,
            chosen.expect,
        )

    return choose


def _namespace_names(
    source: Source, owners: OwnerNumbers | None
) -> Callable[[], Mapping[int, str]]:
    def of_owners() -> Mapping[int, str]:
        return owners.of_namespaces(source.ledger().series) if owners else {}

    return namespaces.Names(source.namespaces, of_owners).read


def make_collector(
    source: Source,
    settings: Settings,
    choice: Choice,
    owners: OwnerNumbers | None = None,
) -> ConnectionCollector:
    """Make the collector of a source, with these settings and its first choice."""
    by_netns = choice.selection.by_netns
    return ConnectionCollector(
        source,
        choice,
        max_series=settings.max_series,
        names=_namespace_names(source, owners) if by_netns else None,
        owners=owners,
        bounds_s=settings.bounds_s,
        has_clients=settings.clients,
    )
