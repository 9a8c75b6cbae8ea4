# SPDX-License-Identifier: GPL-3.0-only
"""A cgroup, version 1 or 2, that limits memory: cgroups(7)."""

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
    """Yield the path of its cgroup.procs; writing a process id there limits that
    process."""
    version_1 = MOUNT / "memory"
    name = f"tcpexporter-test-{os.getpid()}-{next(_numbers)}"
    if version_1.is_dir():
        cgroup, file = version_1 / name, "memory.limit_in_bytes"
    else:
        cgroup, file = MOUNT / name, "memory.max"
        try:
            (MOUNT / "cgroup.subtree_control").write_text("+memory")
        except OSError as error:
            pytest.skip(f"cannot create a memory cgroup: {error}")
    cgroup.mkdir()
    try:
        (cgroup / file).write_text(str(limit_mib << 20))
        yield cgroup / "cgroup.procs"
    finally:
        eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()
