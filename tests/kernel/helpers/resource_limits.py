# SPDX-License-Identifier: GPL-3.0-only
"""Sets limits of an exporter that runs."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import Exporter, eventually

CGROUPS = Path("/sys/fs/cgroup")


class Pids:
    """A cgroup of its own that limits processes and threads: cgroups(7), v1 or v2."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def within(self, command: tuple[str, ...], most: str = "max") -> tuple[str, ...]:
        """A command that runs another one there."""
        script = 'echo $$ >$0/cgroup.procs; echo $1 >$0/pids.max; shift; exec "$@"'
        return ("sh", "-c", script, str(self.path), most, *command)

    def allow(self, most: str) -> None:
        """Set how many there may be; ``1`` is fewer than there are, so none can start."""
        (self.path / "pids.max").write_text(most)

    def refused(self) -> int:
        """How many could not start."""
        return int((self.path / "pids.events").read_text().split()[1])


@contextlib.contextmanager
def pids_cgroup() -> Iterator[Pids]:
    """Make it, and remove it when nothing is left in it."""
    above = CGROUPS / "pids"
    if not above.exists():  # v2
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
    """As prlimit(1) takes them, with a colon behind the soft one that can be raised again.

    As the exporter's user: root itself would need CAP_SYS_RESOURCE, which some containers
    do not give it.
    """
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*as_nobody, "prlimit", f"--pid={exporter.process.pid}", *limits]
    subprocess.run(command, check=True)
