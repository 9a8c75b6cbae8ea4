# SPDX-License-Identifier: GPL-3.0-only
"""What is broken on purpose, and what is then done: as documented, in one sentence."""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import sys

import pytest

from tcpexporter.errors import LoadError
from tcpexporter.tracker import Tracker
from tests.kernel.loading import kill_loader, loader_is_killed
from tests.kernel.tracking import at_port, attach
from tests.support import DEADLINE_S, Exporter, Peers, eventually

COMMAND = f"{sys.executable} -m tcpexporter"


def in_own_mounts(preparation: str) -> tuple[str, ...]:
    """A command that runs the exporter where something is mounted or not, for it alone."""
    script = f'set -e; {preparation}; exec {COMMAND} "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


WITHOUT_BTF = in_own_mounts("mount --bind /dev/null /sys/kernel/btf/vmlinux")
WITHOUT_TRACEFS = in_own_mounts(
    "mount -t tmpfs none /sys/kernel/tracing; mount -t tmpfs none /sys/kernel/debug"
)
WITHOUT_PROC = in_own_mounts("mount -t tmpfs none /proc")


def refused(command: tuple[str, ...], *arguments: str) -> str:
    """What it says when it cannot start: its last line."""
    ended = subprocess.run(
        [*command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.any_kernel
def test_without_btf_it_says_what_still_works() -> None:
    """The program cannot be loaded without the kernel's types; polling is offered."""
    sentence = refused(WITHOUT_BTF, "--source", "ebpf")
    assert "no BTF" in sentence
    assert "--source sock_diag" in sentence


def test_without_btf_auto_polls() -> None:
    """``--source auto`` falls back, and says the same."""
    with Exporter(command=WITHOUT_BTF) as exporter, Peers() as peers:
        peers.connect(3)
        eventually(lambda: exporter.established(peers.port) == 3)
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        _, complaints = exporter.stop()
    assert "no BTF" in complaints


def test_tracefs_is_not_needed() -> None:
    """A minimal host has neither tracefs nor debugfs mounted."""
    arguments = ("--source", "ebpf")
    with Exporter(*arguments, command=WITHOUT_TRACEFS) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3


@pytest.mark.any_kernel
def test_without_proc_it_says_so() -> None:
    """A /proc that cannot be read ends it with one sentence."""
    assert "/proc/" in refused(WITHOUT_PROC, "--source", "procfs")


def deny_netlink() -> None:
    """Have the kernel refuse netlink sockets to this process, by seccomp(2)."""
    load, jump, give_back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allowed, denied = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, ERRNO | EPERM
    socket_number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    program = (
        (load, 0, 0, 0),  # the number of the system call
        (jump, 0, 3, socket_number),
        (load, 0, 0, 16),  # its first argument
        (jump, 0, 1, socket.AF_NETLINK),
        (give_back, 0, 0, denied),
        (give_back, 0, 0, allowed),
    )
    code = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *each) for each in program)
    )
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.c_char_p(filter_), 0, 0) == 0  # PR_SET_SECCOMP, FILTER


DENY_AND_RUN = """
from tcpexporter.__main__ import main
from tests.kernel.test_faults import deny_netlink
deny_netlink()
main()
"""
WITHOUT_NETLINK = (sys.executable, "-c", DENY_AND_RUN)


@pytest.mark.any_kernel
def test_without_sock_diag_proc_is_read() -> None:
    """Where netlink is refused, connections from before come from /proc/net/tcp."""
    with Peers() as peers:
        peers.connect(7)
        with Exporter("--source", "ebpf", command=WITHOUT_NETLINK) as exporter:
            peers.connect(4)
            assert exporter.established(peers.port) == 11
            _, complaints = exporter.stop()
    assert "reading /proc/net/tcp instead of sock_diag" in complaints


@pytest.mark.any_kernel
def test_a_named_sock_diag_does_not_fall_back() -> None:
    """``--source sock_diag`` where netlink is refused: exit code 1."""
    assert "sock_diag" in refused(WITHOUT_NETLINK, "--source", "sock_diag")


@pytest.mark.any_kernel
@pytest.mark.parametrize("part", [0, 0.2, 0.4, 0.6, 0.8])
def test_a_loader_killed_at_any_step_leaves_nothing_half_done(
    load_s: float, part: float
) -> None:
    """Its parent is told that it died, in one sentence, or has all it needs."""
    with loader_is_killed(part * load_s):
        tracker, reason = attach_or_reason()
    if tracker is None:
        assert "died" in reason
        return
    with contextlib.closing(tracker), Peers() as peers:
        peers.connect(3)
        assert len(at_port(tracker, peers.port)) == 3


def attach_or_reason() -> tuple[Tracker | None, str]:
    try:
        return attach(), ""
    except LoadError as error:
        return None, str(error)


@pytest.mark.any_kernel
def test_a_killed_loader_ends_the_exporter() -> None:
    """With one sentence, and exit code 1."""
    with Exporter("--source", "ebpf", wait=False) as exporter:
        kill_loader(exporter.process.pid, after_s=0)
        _, complaints = exporter.process.communicate(timeout=DEADLINE_S)
        assert exporter.process.returncode == 1
        assert "Traceback" not in complaints
        assert "died" in complaints


def test_in_a_time_namespace_ages_are_right() -> None:
    """A container's CLOCK_BOOTTIME may be days ahead; the kernel's timestamps are not."""
    ahead = ("unshare", "--time", "--fork", "--kill-child", "--boottime", "86400")
    command = (*ahead, *COMMAND.split())
    with Peers() as peers:
        peers.connect(3)
        with Exporter("--duration", "3600", command=command) as exporter:
            peers.connect(4)
            assert exporter.established(peers.port) == 7
            assert exporter.long_term(peers.port) == 0
