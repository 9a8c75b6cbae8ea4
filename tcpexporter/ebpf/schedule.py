# SPDX-License-Identifier: GPL-3.0-only
"""Decides when to reconcile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EventCounts:
    """What the kernel and the tracker have counted; nothing happened while it is equal."""

    missed: int = 0
    """Events that were missed or refused, closings that were not recorded, and slots that
    were restored. Each of them can make the tracker wrong."""
    changes: int = -1
    """Connections that the program added or removed."""


class Schedule:
    """Decides when to reconcile; the caller passes all times, in seconds of one clock.

    A run is due when the interval has passed, when more events were missed, and when the
    previous run is not confirmed: it corrected something, or was the first after a miss.
    A run at the interval can be skipped if the two runs before it found nothing, were an
    interval apart, and nothing was counted since the first of them: case s is over by then.
    """

    def __init__(self, *, interval_s: float, now_s: float) -> None:
        """Begin after seeding, which the first run confirms.

        Args:
            interval_s: between two runs; 0: run only when events were missed.
            now_s: when seeding ended.
        """
        self._interval_s = interval_s
        self._ended_s = now_s
        self._rest_s = 0.0
        self._previous = EventCounts()
        self._is_confirmed = False
        self._agreed: EventCounts | None = None

    def is_due(self, counts: EventCounts, now_s: float) -> bool:
        """Return whether to reconcile now, or to record that this can be skipped."""
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
            counts: what was counted before it began.
            found_nothing: whether tables and tracker agreed.
            rest_s: how long no other run may begin.
            began_s: when it began.
            now_s: when it ended.
        """
        is_repeated = found_nothing and counts == self._previous
        if is_repeated and self._is_interval_over(began_s):
            self._agreed = counts
        self._is_confirmed = found_nothing and counts.missed == self._previous.missed
        self._previous = counts
        self._rest_s = rest_s
        self._ended_s = now_s

    def record_failure(self, now_s: float) -> None:
        """Record that a run failed: a run stays due until one succeeds."""
        self._ended_s = now_s
        self._is_confirmed = False

    def _is_interval_over(self, now_s: float) -> bool:
        return 0 < self._interval_s <= now_s - self._ended_s
