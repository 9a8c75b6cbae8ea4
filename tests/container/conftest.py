# SPDX-License-Identifier: GPL-3.0-only
"""Every container test has a network namespace of its own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.podman import why_no_containers
from tests.container.pods import unique
from tests.support import inside, new_netns

BPF_FS = Path("/sys/fs/bpf")


@pytest.fixture(scope="session")
def _images() -> None:
    if reason := why_no_containers():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _netns(_images: None) -> Iterator[None]:
    """Run the test, and the containers that it starts, in a new network namespace."""
    with new_netns() as name, inside(name):
        yield


@pytest.fixture
def pins() -> Iterator[str]:
    """Yield a directory for --pin that no other exporter uses."""
    if not BPF_FS.is_mount():
        subprocess.run(["mount", "-t", "bpf", "bpf", BPF_FS], check=True)
    path = f"{BPF_FS}/{unique('pins')}"
    yield path
    subprocess.run(
        [sys.executable, "-m", "tcpexporter", "--unpin", "--pin", path], check=True
    )
