# SPDX-License-Identifier: GPL-3.0-only
"""The schedule decides when a reconciliation is due; no kernel is necessary."""

import pytest

from tcpexporter.ebpf.schedule import EventCounts, Schedule

INTERVAL_S = 61.0


class Clocked:
    """Asks a schedule every second, and records the runs."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self.schedule = Schedule(interval_s=interval_s, now_s=0)
        self.now_s = 0.0
        self.runs: list[float] = []
        self.skipped: list[float] = []

    def watch(
        self, seconds: int, counts: EventCounts, *, finds: int = 0, rest_s: float = 0
    ) -> None:
        """Ask once a second for ``seconds``; the first ``finds`` runs find a difference."""
        for _ in range(seconds):
            self.now_s += 1
            if not self.schedule.is_due(counts, self.now_s):
                continue
            can_be_skipped = self.schedule.can_be_skipped(counts)
            (self.skipped if can_be_skipped else self.runs).append(self.now_s)
            self.schedule.record_run(
                counts,
                found_nothing=finds <= 0,
                rest_s=rest_s,
                began_s=self.now_s,
                now_s=self.now_s,
            )
            finds -= 1


def test_seeding_is_confirmed_at_once_and_then_at_the_interval() -> None:
    """s: The first run finds a seed whose connection was closing during seeding."""
    clocked = Clocked()
    clocked.watch(100, EventCounts(0, 7))
    assert clocked.runs == [1, 62]


def test_runs_are_skipped_after_two_an_interval_apart() -> None:
    """Both runs found no difference, and no event was counted since the first one."""
    clocked = Clocked()
    clocked.watch(200, EventCounts(0, 7))
    assert clocked.runs == [1, 62]
    assert clocked.skipped == [123, 184]
    clocked.watch(100, EventCounts(0, 8))
    assert clocked.runs == [1, 62, 245]


def test_agreement_right_after_a_missed_event_is_checked_again() -> None:
    """s: The state of the missed event may not have been stored when the tables were read.

    The fault: after one run without differences all runs were skipped, so on a quiet host a
    wrong count never changed.
    """
    clocked = Clocked()
    clocked.watch(5, EventCounts(0, 7))
    clocked.watch(100, EventCounts(3, 7))
    assert clocked.runs == [1, 6, 7, 68]
    assert not clocked.skipped


@pytest.mark.parametrize("interval_s", [0, INTERVAL_S])
def test_a_correction_is_followed_by_a_run_until_nothing_is_found(
    interval_s: float,
) -> None:
    """A correction can be wrong, so the next run does not wait for the interval."""
    clocked = Clocked(interval_s)
    clocked.watch(7, EventCounts(0, 7), finds=3)
    assert clocked.runs == [1, 2, 3, 4]


def test_without_an_interval_only_missed_events_are_a_reason() -> None:
    """With --reconcile-interval 0, events that the program has handled cause no run."""
    clocked = Clocked(interval_s=0)
    clocked.watch(100, EventCounts(0, 7))
    clocked.watch(100, EventCounts(0, 1009))
    assert clocked.runs == [1]
    clocked.watch(100, EventCounts(1, 1009))
    assert clocked.runs == [1, 201, 202]


def test_no_reason_overrides_the_share_of_cpu() -> None:
    """No run begins during the pause that follows the previous run."""
    clocked = Clocked()
    clocked.watch(31, EventCounts(0, 7), finds=31, rest_s=11)
    assert clocked.runs == [1, 12, 23]


def test_a_failed_run_stays_due() -> None:
    """It is due again at the next check."""
    clocked = Clocked()
    assert clocked.schedule.is_due(EventCounts(0, 7), 1)
    clocked.schedule.record_failure(1)
    assert clocked.schedule.is_due(EventCounts(0, 7), 2)
