# SPDX-License-Identifier: GPL-3.0-only
"""Decides when to reconcile."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Signs:
    """What the kernel and the tracker count; while nothing does, no event is reported."""

    trouble: int = 0
    """Events that were missed or refused, and what may come of that."""
    changes: int = -1
    """Connections that the program added or removed."""


class Schedule:
    """Decides when to reconcile; pure, times are given in seconds of any one clock.

    A run is due when the interval has passed, when there is new trouble, and when the run
    before it is not confirmed: it corrected something, or was the first to see its trouble.
    A run at the interval is needless if the two runs before it found nothing, were an
    interval apart, and nothing was counted since the first of them: case s is over by then.
    """

    def __init__(self, *, interval_s: float, now_s: float) -> None:
        """Begin after seeding, whose outcome the first run confirms.

        Args:
            interval_s: between two runs; 0: only when events were missed.
            now_s: when seeding ended.
        """
        self._interval_s = interval_s
        self._ended_s = now_s
        self._rest_s = 0.0
        self._seen = Signs()
        self._is_confirmed = False
        self._agreed: Signs | None = None

    def is_due(self, signs: Signs, now_s: float) -> bool:
        """Whether to reconcile now, or to record that this is needless."""
        if now_s - self._ended_s < self._rest_s:
            return False
        has_trouble = signs.trouble != self._seen.trouble
        return has_trouble or not self._is_confirmed or self._is_interval_over(now_s)

    def is_needless(self, signs: Signs) -> bool:
        """Whether a run that is due would find nothing."""
        return signs == self._agreed

    def ended(
        self,
        signs: Signs,
        *,
        found_nothing: bool,
        rest_s: float,
        began_s: float,
        now_s: float,
    ) -> None:
        """Record a run, needless or not.

        Args:
            signs: what was counted before it began.
            found_nothing: whether tables and tracker agreed.
            rest_s: for how long there may be no other.
            began_s: when it began.
            now_s: when it ended.
        """
        is_repeated = found_nothing and signs == self._seen
        if is_repeated and self._is_interval_over(began_s):
            self._agreed = signs
        self._is_confirmed = found_nothing and signs.trouble == self._seen.trouble
        self._seen = signs
        self._rest_s = rest_s
        self._ended_s = now_s

    def failed(self, now_s: float) -> None:
        """Record that a run was tried and could not be made: it is due until one is."""
        self._ended_s = now_s
        self._is_confirmed = False

    def _is_interval_over(self, now_s: float) -> bool:
        return 0 < self._interval_s <= now_s - self._ended_s
