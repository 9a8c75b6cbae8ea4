# SPDX-License-Identifier: GPL-3.0-only
"""Sets resource limits of a running exporter."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import Exporter, eventually

CGROUPS = Path("/sys/fs/cgroup")


class Pids:
    """A cgroup that limits the number of processes and threads: cgroups(7), v1 or v2."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def within(self, command: tuple[str, ...], most: str = "max") -> tuple[str, ...]:
        """Return a command that runs another command in this cgroup."""
        script = 'echo $$ >$0/cgroup.procs; echo $1 >$0/pids.max; shift; exec "$@"'
        return ("sh", "-c", script, str(self.path), most, *command)

    def allow(self, most: str) -> None:
        """Set the maximum number; ``1`` is fewer than an exporter has, so none can
        start."""
        (self.path / "pids.max").write_text(most)

    def refused(self) -> int:
        """Return how many processes and threads the kernel has refused."""
        return int((self.path / "pids.events").read_text().split()[1])


@contextlib.contextmanager
def pids_cgroup() -> Iterator[Pids]:
    """Create the cgroup, and remove it when its last process has ended."""
    above = CGROUPS / "pids"
    if not above.exists():  # version 2
        above = CGROUPS
        (above / "cgroup.subtree_control").write_text("+pids")
    path = above / f"tcpexporter-test-{os.getpid()}"
    path.mkdir()
    try:
        yield Pids(path)
    finally:
        eventually(lambda: not (path / "cgroup.procs").read_text())
        path.rmdir()


def limit(exporter: Exporter, *limits: str) -> None:
    """Set a limit of the exporter, as an argument of prlimit(1).

    A colon after the soft limit keeps the hard limit, so that the soft limit can be raised
    again. This runs as the exporter's user: root would require CAP_SYS_RESOURCE, which some
    containers lack.
    """
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*as_nobody, "prlimit", f"--pid={exporter.process.pid}", *limits]
    subprocess.run(command, check=True)
