# SPDX-License-Identifier: GPL-3.0-only
"""Containers that Podman runs, without an image and without a registry."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from tests.support import DEADLINE_S, eventually

PORT = 7007

CONNECTED = (
    f"busybox nc -ll -p {PORT} -e busybox cat &"
    f" until busybox nc -w 1 127.0.0.1 {PORT} -e busybox sleep 1000; do :; done"
)
"""A shell script with a listener on `PORT` and a connection to it, within the container."""


class Container(NamedTuple):
    """A running container."""

    id: str
    """64 hexadecimal digits."""
    pid: int
    """The id of its first process."""


def _found(command: str) -> str:
    path = shutil.which(command, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        pytest.skip(f"{command} is not installed")
    return path


@contextlib.contextmanager
def running_container(
    script: str = CONNECTED, *, network: str = "none"
) -> Iterator[Container]:
    """Run a container; remove it afterwards.

    Args:
        script: a script for busybox's shell; the container ends when it ends.
        network: as in podman-run(1): "none" is a new namespace with a loopback device,
            "host" is that of the test.
    """
    with TemporaryDirectory() as directory:
        root = Path(directory, "root")
        (root / "bin").mkdir(parents=True)
        shutil.copy(_found("busybox"), root / "bin")
        # Do not use the machine's own storage. Only this cgroup driver needs no systemd.
        # runc runs containers on hosts with both versions of cgroups, where crun does not.
        podman = [
            _found("podman"),
            f"--root={directory}/storage",
            f"--runroot={directory}/run",
            "--storage-driver=vfs",
            "--cgroup-manager=cgroupfs",
            f"--runtime={_found('runc')}",
        ]

        def run(*arguments: str) -> str:
            return subprocess.run(
                [*podman, *arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=DEADLINE_S,
            ).stdout.strip()

        # The default limits can be higher than those of the machine.
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
        started = ("run", "--detach", f"--network={network}", *limits)
        container = run(*started, "--rootfs", str(root), "/bin/busybox", "sh", "-c", script)
        try:
            yield Container(
                container, int(run("inspect", "--format={{.State.Pid}}", container))
            )
        finally:
            run("rm", "--force", "--time=0", container)
            # Its last processes write to the directory: conmon, and podman's cleanup.
            eventually(lambda: not _is_used(directory))


def _is_used(directory: str) -> bool:
    """Return whether a process has the directory in its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            if directory.encode() in path.read_bytes():
                return True
    return False
