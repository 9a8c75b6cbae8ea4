# SPDX-License-Identifier: GPL-3.0-only
"""Cgroups of version 2 that a test creates, and processes in them: cgroups(7)."""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

import pytest

from tcpexporter.host.cgroups import find
from tests.support import DEADLINE_S, eventually

ENTERING = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
"""A shell script that enters a cgroup, then runs a command."""

_numbers = itertools.count()


@cache
def mount_point() -> Path:
    """Return where the file system cgroup2 is mounted; without it, the test is skipped."""
    mount = find()
    if mount is None:
        pytest.skip("the file system cgroup2 is not mounted")
    return Path(mount.point)


class Cgroup:
    """A cgroup of the test, which processes can be started in."""

    def __init__(self, path: str) -> None:
        self.path = path
        """The path as in /proc/PID/cgroup."""
        self.directory = mount_point() / path.strip("/")
        self.directory.mkdir(parents=True)
        self.id = self.directory.stat().st_ino

    @contextlib.contextmanager
    def running(
        self, *command: str, stdin: int | IO[str] | None = None
    ) -> Iterator["subprocess.Popen[str]"]:
        """Run a command in the cgroup, with its output in a pipe; end it afterwards."""
        with subprocess.Popen(
            ["sh", "-c", ENTERING, self.directory, *command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                # A short command can have ended already.
                eventually(lambda: self._holds(process.pid) or process.poll() is not None)
                yield process
            finally:
                process.kill()
                process.wait(DEADLINE_S)

    def remove(self) -> None:
        """Remove the cgroup. Its processes have ended."""
        eventually(lambda: not self._procs())
        self.directory.rmdir()

    def _holds(self, pid: int) -> bool:
        return str(pid) in self._procs()

    def _procs(self) -> list[str]:
        return (self.directory / "cgroup.procs").read_text().split()


@contextlib.contextmanager
def new_cgroup(name: str = "") -> Iterator[Cgroup]:
    """Create a cgroup inside a new cgroup of the test; remove both after the block.

    Args:
        name: the name of its directory, or the names of nested directories, such as
            "system.slice/nginx.service".
    """
    top = f"/tcpexporter-test-{os.getpid()}-{next(_numbers)}"
    try:
        yield Cgroup(f"{top}/{name}".rstrip("/"))
    finally:
        remove_all(mount_point() / top.strip("/"))


def remove_all(top: Path) -> None:
    """Remove a cgroup and those below it."""
    for directory, _, files in os.walk(top, topdown=False):
        if "cgroup.procs" in files:
            procs = Path(directory, "cgroup.procs")
            eventually(lambda procs=procs: not procs.read_text())  # type: ignore[misc]
        Path(directory).rmdir()
