# SPDX-License-Identifier: GPL-3.0-only
"""The paths of real cgroups, including those created after the exporter's start."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpexporter.ebpf import features
from tcpexporter.host.cgroups import ROOT_ID, CgroupPaths, find
from tcpexporter.metrics.owners import Owner, owner_of
from tests.kernel.helpers.cgroups import mount_point, new_cgroup
from tests.kernel.helpers.containers import PORT, running_container
from tests.kernel.test_features import found
from tests.support import DEADLINE_S, eventually

LISTENING = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""
"""A program with a listening socket; it prints the port."""

CONFINED = """
import errno, sys
from tcpexporter.host import cgroups, confine, privileges, seccomp
paths = cgroups.open_paths()
account = privileges.find_account("nobody")
code = seccomp.make_filter(None)
confined = confine.confine(account, lambda: None, code, cgroups=paths.descriptor)
print(all(confined.values()), flush=True)
number, file = sys.stdin.readline().split()
print(paths.paths([int(number)]).get(int(number)))
try:
    open(file)
    print("read")
except OSError as error:
    print(errno.errorcode[error.errno])
print(paths.removed([int(number)]), flush=True)
"""
"""A program that gives up its privileges, then looks for a cgroup and reads its file."""


IN_A_NAMESPACE = """
import subprocess, sys
from tcpexporter.host.cgroups import CgroupPaths, find
number = int(sys.argv[1])
for _ in range(2):
    mount = find()
    paths = CgroupPaths(mount)
    print(mount.root, paths.is_whole, paths.paths([number]).get(number), flush=True)
    paths.close()
    subprocess.run(["umount", "-l", mount.point], check=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", mount.point], check=True)
"""
"""A program that looks for its own cgroup: with the host's mount, and with its own."""


def cgroup_of(pid: int) -> str:
    """Return the path of a process's cgroup: the line of version 2 in /proc/PID/cgroup."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (path,) = (line.removeprefix("0::") for line in lines if line.startswith("0::"))
    return path


def cgroup_of_listener(port: int, *within: str) -> str:
    """Return the path that ss(8) shows for the listening socket of a port."""
    command = [*within, "ss", "-H", "-tln", "--cgroup", "sport", "=", f":{port}"]
    shown = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=DEADLINE_S
    ).stdout
    return shown.partition("cgroup:")[2].strip()


@pytest.fixture
def paths() -> Iterator[CgroupPaths]:
    mount_point()
    mount = find()
    assert mount
    opened = CgroupPaths(mount, clock=Clock())
    yield opened
    opened.close()


class Clock:
    """A clock that advances a minute at each call, so that no walk is postponed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 60.0
        return self.now_s


def test_the_root_cgroup_has_the_id_1(paths: CgroupPaths) -> None:
    """The kernel numbers the directories of the file system from 1."""
    assert paths.is_whole
    assert paths.paths([ROOT_ID]) == {ROOT_ID: "/"}


@pytest.mark.any_kernel
def test_a_cgroup_has_the_path_that_its_processes_and_sockets_show(
    paths: CgroupPaths,
) -> None:
    """The paths are compared with /proc/PID/cgroup and with ss, which asks the kernel for
    the id of the socket's cgroup."""
    with (
        new_cgroup("system.slice/nginx.service") as cgroup,
        cgroup.running(sys.executable, "-c", LISTENING, stdin=subprocess.PIPE) as process,
    ):
        assert process.stdout
        port = int(process.stdout.readline())
        path = paths.paths([cgroup.id])[cgroup.id]
        assert path == cgroup_of(process.pid) == cgroup_of_listener(port)
        assert owner_of(path).unit == "nginx.service"


def test_a_cgroup_that_is_created_after_the_start_has_a_path_at_once(
    paths: CgroupPaths,
) -> None:
    with new_cgroup() as first:
        assert paths.paths([first.id]) == {first.id: first.path}
        with new_cgroup("nested/further") as second:
            ids = (first.id, second.id)
            assert paths.paths(ids) == {first.id: first.path, second.id: second.path}


def test_a_removed_cgroup_keeps_its_path_while_it_is_requested(paths: CgroupPaths) -> None:
    with new_cgroup("gone") as cgroup:
        paths.paths([cgroup.id])
        assert paths.removed([cgroup.id]) == set()
        cgroup.remove()
        assert paths.paths([cgroup.id]) == {cgroup.id: cgroup.path}
        assert paths.removed([cgroup.id]) == {cgroup.id}
        assert paths.paths([]) == {}


def test_a_new_cgroup_at_the_path_of_a_removed_one_has_another_id(
    paths: CgroupPaths,
) -> None:
    """The restart of a service does this, while connections of the old one are open."""
    with new_cgroup("a.service") as old:
        paths.paths([old.id])
        old.remove()
        old.directory.mkdir()
        new = old.directory.stat().st_ino
        assert new != old.id
        assert paths.paths([old.id, new]) == {old.id: old.path, new: old.path}
        assert paths.removed([old.id, new]) == {old.id}


def test_a_cgroup_that_was_removed_before_it_was_requested_has_no_path(
    paths: CgroupPaths,
) -> None:
    """It counts as removed after two walks."""
    with new_cgroup("gone") as cgroup:
        cgroup.remove()
        assert paths.paths([cgroup.id]) == {}
        assert paths.removed([cgroup.id]) == set()
        assert paths.paths([cgroup.id]) == {}
        assert paths.removed([cgroup.id]) == {cgroup.id}


@pytest.mark.any_kernel
def test_the_socket_of_a_removed_cgroup_keeps_the_id(paths: CgroupPaths) -> None:
    """A process can move to another cgroup, but its sockets do not."""
    with new_cgroup("left") as left, new_cgroup("entered") as entered:
        with left.running(
            sys.executable, "-c", LISTENING, stdin=subprocess.PIPE
        ) as process:
            assert process.stdout
            port = int(process.stdout.readline())
            paths.paths([left.id])
            (entered.directory / "cgroup.procs").write_text(str(process.pid))
            left.remove()
            assert "left" not in cgroup_of_listener(port)  # ss finds no directory
            assert paths.paths([left.id]) == {left.id: left.path}
            assert paths.removed([left.id]) == {left.id}


def test_a_cgroup_namespace_hides_the_other_cgroups() -> None:
    """In a container, a mount of the host's file system shows all, and its own a part."""
    with (
        new_cgroup("a.service") as cgroup,
        cgroup.running(
            *("unshare", "--cgroup", "--mount", sys.executable, "-c", IN_A_NAMESPACE),
            str(cgroup.id),
        ) as process,
    ):
        assert process.stdout
        assert process.stdout.readline().split() == ["/../..", "True", cgroup.path]
        assert process.stdout.readline().split() == ["/", "False", "/"]


def test_a_confined_process_finds_new_cgroups_but_reads_no_file_of_them() -> None:
    """The program has neither root nor a capability, and seccomp and Landlock restrict it.

    The cgroup is created after that.
    """
    with subprocess.Popen(
        [sys.executable, "-c", CONFINED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        has_landlock = bool(found(features.LANDLOCK))
        assert process.stdout.readline() == f"{has_landlock}\n"
        with new_cgroup("system.slice/late.service") as cgroup:
            file = cgroup.directory / "cgroup.procs"
            process.stdin.write(f"{cgroup.id} {file}\n")
            process.stdin.flush()
            shown = process.stdout.read().split()
        assert shown == [cgroup.path, "EACCES" if has_landlock else "read", "set()"]


@pytest.mark.any_kernel
def test_a_container_of_podman_owns_its_sockets(paths: CgroupPaths) -> None:
    """The container has a listener and a connection in its own network namespace."""
    with running_container() as container:
        within = ("nsenter", "-t", str(container.pid), "-n")
        eventually(lambda: bool(cgroup_of_listener(PORT, *within)))
        path = cgroup_of_listener(PORT, *within)
        assert path == cgroup_of(container.pid)
        number = (mount_point() / path.strip("/")).stat().st_ino
        assert paths.paths([number]) == {number: path}
        assert owner_of(path) == Owner(path, "", container.id[:12], "")
