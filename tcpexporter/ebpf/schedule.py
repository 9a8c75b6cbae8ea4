# SPDX-License-Identifier: GPL-3.0-only
"""Decides when to reconcile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EventCounts:
    """Counts of the kernel and the tracker; equal counts mean that nothing has happened."""

    missed: int = 0
    """Missed events, refused events, unrecorded closings and restored slots.

    Each of them can make the tracker wrong.
    """
    changes: int = -1
    """Connections that the program added or removed."""


class Schedule:
    """Decides when to reconcile; the caller passes all times, in seconds of one clock.

    A run is due in each of these cases: the interval has passed; more events were missed;
    the previous run corrected something; the previous run was the first after a missed
    event.

    A run at the interval can be skipped if the counts are those of two runs in a row. The
    second of them must have found nothing, and have begun at least one interval after the
    first one ended. By then, case s of `reconcile` is over.
    """

    def __init__(self, *, interval_s: float, now_s: float) -> None:
        """Begin after seeding; the first run checks the result of seeding.

        Args:
            interval_s: seconds between two runs; 0: run only after missed events.
            now_s: the time when seeding ended.
        """
        self._interval_s = interval_s
        self._ended_s = now_s
        self._rest_s = 0.0
        self._previous = EventCounts()
        self._is_confirmed = False
        self._agreed: EventCounts | None = None

    def is_due(self, counts: EventCounts, now_s: float) -> bool:
        """Return whether a run is due now; `can_be_skipped` says whether to skip it."""
        if now_s - self._ended_s < self._rest_s:
            return False
        has_missed = counts.missed != self._previous.missed
        return has_missed or not self._is_confirmed or self._is_interval_over(now_s)

    def can_be_skipped(self, counts: EventCounts) -> bool:
        """Return whether a run that is due would find nothing."""
        return counts == self._agreed

    def record_run(
        self,
        counts: EventCounts,
        *,
        found_nothing: bool,
        rest_s: float,
        began_s: float,
        now_s: float,
    ) -> None:
        """Record a run that has ended or was skipped.

        Args:
            counts: the counts when the run began.
            found_nothing: whether nothing was corrected.
            rest_s: seconds after ``now_s`` during which no other run may begin.
            began_s: the time when the run began.
            now_s: the time when the run ended.
        """
        is_repeated = found_nothing and counts == self._previous
        if is_repeated and self._is_interval_over(began_s):
            self._agreed = counts
        self._is_confirmed = found_nothing and counts.missed == self._previous.missed
        self._previous = counts
        self._rest_s = rest_s
        self._ended_s = now_s

    def record_failure(self, now_s: float) -> None:
        """Record that a run failed: a run is due until a run succeeds."""
        self._ended_s = now_s
        self._is_confirmed = False

    def _is_interval_over(self, now_s: float) -> bool:
        return 0 < self._interval_s <= now_s - self._ended_s
