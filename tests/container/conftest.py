# SPDX-License-Identifier: GPL-3.0-only
"""Every container test has a network namespace of its own."""

from collections.abc import Iterator

import pytest

from tests.container.podman import why_no_containers
from tests.support import inside, new_netns


@pytest.fixture(scope="session")
def _images() -> None:
    if reason := why_no_containers():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _netns(_images: None) -> Iterator[None]:
    """Run the test, and the containers that it starts, in a new network namespace."""
    with new_netns() as name, inside(name):
        yield
