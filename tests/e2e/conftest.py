# SPDX-License-Identifier: GPL-3.0-only
"""Every e2e test runs in a network namespace of its own, or says why it cannot."""

from collections.abc import Iterator

import pytest

from tests.support import inside, new_netns, why_no_bpf


@pytest.fixture(autouse=True)
def netns() -> Iterator[str]:
    """The name of the namespace that the test and what it starts are in."""
    if reason := why_no_bpf():
        pytest.skip(reason)
    with new_netns() as name, inside(name):
        yield name
