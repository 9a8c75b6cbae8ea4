# SPDX-License-Identifier: GPL-3.0-only
"""The churn soak in short; ``python -m tests.kernel.churn`` is the long one."""

import os
import sys

import pytest

from tests.kernel.churn import churn
from tests.kernel.helpers.effort import Effort


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="with one CPU hardly an event is missed"
)
def test_what_the_kernel_does_not_tell_of_is_corrected(netns: str, effort: Effort) -> None:
    """Events are missed while it is scraped without pause; nothing is wrong at the end."""
    figures = churn(netns, changes=effort.of(400_009), most_s=53)
    sys.stdout.write(str(figures))
    assert not figures.problems
