# SPDX-License-Identifier: GPL-3.0-only
"""Runs each e2e test in its own network namespace, or skips it with the reason."""

from collections.abc import Iterator

import pytest

from tests.support import inside, new_netns, why_no_bpf


@pytest.fixture(autouse=True)
def netns() -> Iterator[str]:
    """Yield the name of the network namespace of the test and its child processes."""
    if reason := why_no_bpf():
        pytest.skip(reason)
    with new_netns() as name, inside(name):
        yield name
