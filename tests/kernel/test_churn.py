# SPDX-License-Identifier: GPL-3.0-only
"""The churn soak in short; ``python -m tests.kernel.churn`` is the long one."""

import sys

from tests.kernel.churn import churn


def test_what_the_kernel_does_not_tell_of_is_corrected(netns: str) -> None:
    """Events are missed while it is scraped without pause; nothing is wrong at the end."""
    figures = churn(netns, changes=400_009, most_s=53)
    sys.stdout.write(str(figures))
    assert not figures.problems
