# SPDX-License-Identifier: GPL-3.0-only
"""A memory cgroup with a limit, of version 1 or 2: cgroups(7)."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually

MOUNT = Path("/sys/fs/cgroup")

_numbers = itertools.count()


@contextlib.contextmanager
def memory_cgroup(limit_mib: int) -> Iterator[Path]:
    """Yields the file that a process has its id written to, to be limited."""
    version_1 = MOUNT / "memory"
    name = f"tcpexporter-test-{os.getpid()}-{next(_numbers)}"
    if version_1.is_dir():
        cgroup, file = version_1 / name, "memory.limit_in_bytes"
    else:
        cgroup, file = MOUNT / name, "memory.max"
        try:
            (MOUNT / "cgroup.subtree_control").write_text("+memory")
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made: {error}")
    cgroup.mkdir()
    try:
        (cgroup / file).write_text(str(limit_mib << 20))
        yield cgroup / "cgroup.procs"
    finally:
        eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
