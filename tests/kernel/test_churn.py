# SPDX-License-Identifier: GPL-3.0-only
"""A short churn soak; ``python -m tests.kernel.churn`` is the long one."""

import os
import sys

import pytest

from tests.kernel.churn import churn
from tests.kernel.helpers.effort import Effort


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="with one CPU too few events are missed"
)
def test_missed_events_are_corrected_under_churn(netns: str, effort: Effort) -> None:
    """The kernel misses events while the exporter is scraped; at the end all counts are
    right."""
    figures = churn(netns, changes=effort.of(400_009), most_s=53)
    sys.stdout.write(str(figures))
    assert not figures.problems


def test_lost_events_are_within_the_published_bound(netns: str, effort: Effort) -> None:
    """The program ignores one in 101 events; the exporter says how many counts may be
    wrong."""
    changes = effort.of(40_009)
    figures = churn(netns, changes=changes, most_s=53, quiet_s=5, lose_one_in=101)
    sys.stdout.write(str(figures))
    assert not figures.problems
