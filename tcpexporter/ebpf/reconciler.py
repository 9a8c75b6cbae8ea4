# SPDX-License-Identifier: GPL-3.0-only
"""Runs `reconcile` in a thread, and bounds the error of the tracker until then."""

import logging
import time
from dataclasses import replace

from tcpexporter.connections.source import ConnectionTables, Reconciliation
from tcpexporter.ebpf.event_counters import Events
from tcpexporter.ebpf.reconcile import NOTHING, Corrections, TrackedConnections, reconcile
from tcpexporter.ebpf.schedule import EventCounts, Schedule
from tcpexporter.errors import enough_memory
from tcpexporter.host.background import Task

log = logging.getLogger(__name__)

WATCH_S = 1.0
"""Seconds between two checks for missed events."""

LIMIT_S = 300.0
"""Seconds after which a run counts as hanging. A host that is short of CPU may require a
minute."""

STOP_TIMEOUT_S = 0.5
"""Seconds that `Reconciler.close` waits for the thread."""


class Reconciler:
    """Reconciles in a thread, when its `Schedule` says that a run is due."""

    def __init__(
        self,
        tracker: TrackedConnections,
        tables: ConnectionTables,
        *,
        interval_s: float,
        cpu_share: float,
    ) -> None:
        """Prepare to reconcile; `start` begins.

        Args:
            tracker: the tracker to correct.
            tables: the socket tables, which only the thread reads.
            interval_s: seconds between two runs; 0: run only after missed events.
            cpu_share: the maximum average CPU use, as a share of one core. After each run
                the thread waits until the average is below it, even if events are missed.
        """
        self.state = Reconciliation(interval_s=interval_s)
        self._tracker = tracker
        self._tables = tables
        self._interval_s = interval_s
        self._cpu_share = cpu_share
        self._missed_before_run = EventCounts().missed
        """`EventCounts.missed` at the start of the last run that succeeded."""
        self._missed_when_exact = 0
        """`EventCounts.missed` at the start of the last run that found nothing."""
        self._last: Corrections | None = None
        """What the last run did; None: there was no run since the start."""
        self.task = Task(
            "reconcile",
            self._watch,
            without="reconciliation failed",
            limit_s=LIMIT_S,
        )

    def start(self) -> None:
        """Start the thread.

        Raises:
            ThreadError: the kernel refuses another thread.
        """
        self.task.begin()

    def close(self) -> bool:
        """Stop the thread; return whether it has ended within `STOP_TIMEOUT_S`."""
        return self.task.stop(STOP_TIMEOUT_S)

    def trouble(self) -> str | None:
        """Return why the tracker stays wrong; None: it is correct or will be corrected.

        While the thread fails or hangs, the tracker is correct until an event is missed.

        Raises:
            TrackerError: the kernel refuses to report missed events.
        """
        trouble = self.task.trouble()
        if trouble and self._missed(self._tracker.events()) != self._missed_before_run:
            return f"events were missed and reconciliation failed: {trouble}"
        return None

    def uncertain(self, events: Events) -> int:
        """Return an upper bound of the difference between the tracker and the kernel.

        It is the number of events that were missed, refused or not recorded since the last
        run that found nothing, and of corrections since then that no run has confirmed.

        Args:
            events: those of the tracker now.
        """
        # The thread may have finished a run after `events` was read.
        missed = max(self._missed(events) - self._missed_when_exact, 0)
        last = self._last or Corrections(refused=self._tracker.seeds_refused)
        return missed + last.missed_open + last.missed_close + last.refused

    def _watch(self) -> None:
        schedule = Schedule(interval_s=self._interval_s, now_s=time.monotonic())
        while not self.task.wait(WATCH_S):
            try:
                with enough_memory():
                    if self._check(schedule):
                        self.task.works()
            except Exception as error:
                self.task.failed(error)
                schedule.record_failure(time.monotonic())

    def _check(self, schedule: Schedule) -> bool:
        """Reclaim slots, and reconcile if a run is due; return whether a run was due."""
        self._tracker.reclaim()
        counts = self._event_counts()
        began_s = time.monotonic()
        if not schedule.is_due(counts, began_s):
            return False
        found_nothing, rest_s = True, 0.0
        if schedule.can_be_skipped(counts):
            self.state = replace(self.state, finished_s=time.time())
        else:
            corrections, rest_s = self._run(counts)
            found_nothing = not (corrections.missed_open or corrections.missed_close)
        schedule.record_run(
            counts,
            found_nothing=found_nothing,
            rest_s=rest_s,
            began_s=began_s,
            now_s=time.monotonic(),
        )
        return True

    def _event_counts(self) -> EventCounts:
        events = self._tracker.events()
        return EventCounts(self._missed(events), events.inserted + events.removed)

    def _missed(self, events: Events) -> int:
        """Return ``missed`` of `EventCounts`."""
        of_program = events.missed + events.refused + events.unrecorded
        return of_program + self._tracker.restored

    def _run(self, counts: EventCounts) -> tuple[Corrections, float]:
        """Reconcile once; return the corrections, and the seconds to wait after the run.

        Args:
            counts: the counts when the run began.
        """
        began_s = time.monotonic()
        began_cpu_s = time.thread_time()
        corrections = reconcile(self._tracker, self._tables)
        self._missed_before_run = counts.missed
        self._last = corrections
        if corrections == NOTHING:
            self._missed_when_exact = counts.missed
        rest_s = (time.thread_time() - began_cpu_s) / self._cpu_share
        self.state = replace(
            self.state,
            runs=self.state.runs + 1,
            missed_open=self.state.missed_open + corrections.missed_open,
            missed_close=self.state.missed_close + corrections.missed_close,
            duration_s=time.monotonic() - began_s,
            finished_s=time.time(),
            interval_s=max(self._interval_s, rest_s) if self._interval_s else 0.0,
        )
        if corrections != NOTHING:
            log.debug("corrected: %s", corrections)
        return corrections, rest_s
