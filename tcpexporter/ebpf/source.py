# SPDX-License-Identifier: GPL-3.0-only
"""Implements the source ``ebpf``: the tracker, and its reconciliation with the tables."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.parts import Parts
from tcpexporter.connections.record import Records, Words
from tcpexporter.connections.series import Ledger
from tcpexporter.connections.snapshot import first_seen, valid_connections
from tcpexporter.connections.source import Report
from tcpexporter.ebpf.listeners import Listeners
from tcpexporter.ebpf.loading import Loading
from tcpexporter.ebpf.pins import Pins
from tcpexporter.ebpf.reconcile import (
    Comparison,
    begin_dump,
    compare,
    reconcile,
    seed,
    seed_in_batches,
)
from tcpexporter.ebpf.reconciler import Reconciler
from tcpexporter.ebpf.runs import Runs
from tcpexporter.ebpf.series_numbers import SeriesNumbers
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import SourceError
from tcpexporter.host.background import Task
from tcpexporter.socket_tables.tables import open_tables

if TYPE_CHECKING:  # imported only with --state, to save memory
    from tcpexporter.socket_tables.saved_ages import State

log = logging.getLogger(__name__)

PUBLISHED_EVENTS = ("inserted", "removed", "refused")
"""The fields of `Events` that the report has in ``kernel_events``."""


class EbpfSource:
    """Connections with the times at which the kernel established them."""

    name = "ebpf"

    def __init__(
        self,
        loading: Loading,
        *,
        netns: str,
        parts: Parts,
        reconcile_interval_s: float,
        reconcile_cpu_share: float,
        pin: str | None = None,
        state: "State | None" = None,
    ) -> None:
        """Wait for the BPF program. Loading it requires root, or CAP_BPF and CAP_PERFMON.

        Args:
            loading: loads the program; the caller closes it.
            netns: the network namespace that ``loading`` observes, for `namespaces.find`,
                or ``all``.
            parts: what ``loading`` counts separately.
            reconcile_interval_s: ``interval_s`` of `Reconciler`.
            reconcile_cpu_share: ``cpu_share`` of `Reconciler`.
            pin: a bpffs directory for pinned maps: those to adopt, and those of this run.
            state: the file of --state, to restore ages, and to save them unless the maps
                are pinned.

        Raises:
            PinError: the pin directory or its content cannot be used.
            SettingsError: the namespace does not exist.
            SourceError: the source cannot be used; the message has the cause and a remedy.
        """
        request = loading.request
        self._max_connections = request.max_connections
        self._state = state
        self._has_warned = False
        with contextlib.ExitStack() as undo:
            self._pins = Pins.open(Path(pin)) if pin else None
            if self._pins:
                undo.callback(self._pins.close)
            descriptors = loading.descriptors()
            undo.callback(descriptors.close)
            runs = Runs(descriptors)
            self._series = SeriesNumbers(
                descriptors, runs, request.max_series, request.lifetime_bounds
            )
            self._tracker = Tracker(
                descriptors, request.max_connections, parts, self._series, runs
            )
            self._tables = open_tables("auto", netns, with_cgroups=parts.by_cgroup)
            undo.callback(self._tables.close)
            if request.netns and request.netns != self._tables.namespaces()[0]:
                raise SourceError(
                    f"--netns {netns} was deleted and created again: restart the exporter"
                )
            self._compared: Comparison | None = None
            if self._pins:
                dump = None
                if self._pins.has_generation():
                    dump = begin_dump(self._tracker, self._tables.batches(with_ages=False))
                    undo.callback(wait, [dump])
                self._pins.adopt(self._tracker, request, self._tables)
                if dump:  # a failure leaves the generations for a later start
                    self._compared = compare(self._tracker, self._tables, dump.result())
                self._pins.pin(descriptors, request)
            undo.pop_all()
        self._listeners = Listeners(self._tables.listeners, self._tracker.listener_changes)
        self._reconciler = Reconciler(
            self._tracker,
            self._tables,
            interval_s=reconcile_interval_s,
            cpu_share=reconcile_cpu_share,
        )

    def tasks(self) -> list[Task]:
        return [self._reconciler.task, *(self._state.tasks() if self._state else ())]

    def start(self) -> None:
        first, self._compared = self._compared, None
        if self._pins and self._pins.adopted:
            reconcile(self._tracker, self._tables, pre_existing=True, first=first)
        elif self._state:
            seed(self._tracker, self._state.aged(self._tables))
        else:
            seed_in_batches(self._tracker, self._tables.batches())
        self._warn_at_capacity(self._tracker.events().refused)
        self._reconciler.start()
        if self._state and not self._pins:
            self._state.begin(self._with_cookies)

    def close(self) -> None:
        """End the threads; close the maps and tables unless a thread still uses them."""
        saving = self._state.tasks() if self._state else []
        has_ended = [self._reconciler.close(), *(each.stop(0) for each in saving)]
        if all(has_ended):
            self._tracker.close()
            self._tables.close()
        if self._pins:
            self._pins.close()

    def read(self) -> Iterator[Chunk]:
        if trouble := self._reconciler.trouble():
            raise SourceError(trouble)
        return self._tracker.chunks()

    def records(self) -> Iterator[tuple[Records, Words]]:
        return self._tracker.read()

    def ledger(self) -> Ledger:
        return self._series.ledger()

    def forget(self, field: str, values: Iterable[int]) -> None:
        self._series.forget(field, values)

    def listeners(self) -> Records:
        return self._listeners.read()

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def report(self) -> Report:
        events = self._tracker.events()
        self._warn_at_capacity(events.refused)
        return Report(
            max_connections=self._max_connections,
            kernel_events={each: getattr(events, each) for each in PUBLISHED_EVENTS},
            missed_events=events.missed,
            uncertain_connections=self._reconciler.uncertain(events),
            kernel_series=self._series.in_use(),
            max_kernel_series=self._series.max_series,
            seeded_connections=self._tracker.seeds(events),
            refused_seeds=self._tracker.seeds_refused,
            reconciliation=self._reconciler.state,
            state_saved_s=self._state.saved_s if self._state else None,
        )

    def _with_cookies(self) -> Records:
        """Return the socket tables' connections with cookies and the tracker's times.

        The tables are read before the tracker. If an address pair closes and opens again in
        between, the time of the new connection gets the cookie of the old one. No later
        connection has that cookie, so that record has no effect. In the other order, a new
        connection could get the age of the old one.
        """
        shown = self._tables.established(with_ages=False)
        return first_seen(shown, itertools.starmap(valid_connections, self._tracker.read()))

    def _warn_at_capacity(self, refused_events: int) -> None:
        refused = refused_events + self._tracker.seeds_refused
        if refused and not self._has_warned:
            log.warning(
                "at capacity: %s connections are not counted: raise --max-connections",
                refused,
            )
            self._has_warned = True
