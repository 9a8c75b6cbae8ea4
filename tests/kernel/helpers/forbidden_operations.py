# SPDX-License-Identifier: GPL-3.0-only
"""Runs an exporter with two additional pages, which attempt forbidden operations.

A test runs it with ``python -c`` and a call of `serve`. The product does not have these
pages.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tcpexporter.__main__ import main
from tcpexporter.host.cgroups import Mount, find
from tcpexporter.host.seccomp import MAP_COMMANDS
from tcpexporter.web import http1, pages
from tests.kernel.helpers.system_calls import NUMBERS

PTRACE_SEIZE = 0x4206
PR_SET_DUMPABLE = 4
CLONE_NEWUSER = 0x10000000
TIOCSTI = 0x5412
X32_GETPID = 0x40000000 + 39

# include/uapi/asm-generic/unistd.h, the same on all architectures
IO_URING_SETUP = 425
PIDFD_OPEN = 434
OPENAT2 = 437

BPF_COMMANDS = 64
"""An upper bound of the number of bpf(2) commands."""

DONE = "done"

_libc = ctypes.CDLL(None, use_errno=True)
_own_page = mmap.mmap(-1, mmap.PAGESIZE)


def _c(function: str, *arguments: int | bytes | None) -> Callable[[], None]:
    """Return a call of a C library function that raises OSError if the result is
    negative."""

    def call() -> None:
        passed = (
            ctypes.c_long(each) if isinstance(each, int) else each for each in arguments
        )
        if getattr(_libc, function)(*passed) < 0:
            raise OSError(ctypes.get_errno(), function)

    return call


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _make_code() -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(_own_page))
    _c("mprotect", address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)()


REFUSED: Mapping[str, Callable[[], object]] = {
    "write a file": lambda: os.open("/dev/null", os.O_WRONLY),
    "make a file": lambda: os.open("/tmp/attempt", os.O_RDONLY | os.O_CREAT),  # noqa: S108
    "open a file with openat2": _c("syscall", OPENAT2, -100, b"/dev/null", None, 24),
    "delete a file": lambda: Path("/tmp/attempt").unlink(),  # noqa: S108
    "make a directory": lambda: Path("/tmp/attempt").mkdir(),  # noqa: S108
    "start a process": _fork,
    "run a program": _c("execve", b"", None, None),
    "make a TCP socket": lambda: socket.socket(socket.AF_INET),
    "make a unix socket": lambda: socket.socket(socket.AF_UNIX),
    "make a netlink socket": lambda: socket.socket(socket.AF_NETLINK),
    "make a pair of datagram sockets": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "connect": _c("connect", -1, None, 0),
    "bind": _c("bind", -1, None, 0),
    "send to an address": _c("sendto", -1, None, 0, 0, b"address", 7),
    "connect by sending": _c("sendmsg", -1, None, socket.MSG_FASTOPEN),
    "receive a descriptor": _c("recvmsg", -1, None, 0),
    "duplicate a descriptor": lambda: fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 0),
    "signal others": lambda: os.kill(0, 0),
    "signal threads of other processes": _c("tgkill", 0, 0, 0),
    "redirect signals to another process": lambda: fcntl.fcntl(
        2, fcntl.F_SETOWN, os.getpid()
    ),
    "open a pidfd": _c("syscall", PIDFD_OPEN, os.getpid(), 0),
    "trace": _c("ptrace", PTRACE_SEIZE, -1, None, None),
    "read memory of another process": _c("process_vm_readv", 1, None, 0, None, 0, 0),
    "mount": _c("mount", None, b"/", None, 0, None),
    "make a namespace": _c("unshare", CLONE_NEWUSER),
    "enter a namespace": _c("setns", -1, 0),
    "make an io_uring": _c("syscall", IO_URING_SETUP, 1, None),
    "make memory executable": _make_code,
    "map executable memory": lambda: mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC
    ),
    "insert input into the terminal": _c("ioctl", 0, TIOCSTI, b"x"),
    "set a limit": _c("prlimit", 0, resource.RLIMIT_CORE, bytes(16), None),
    "allow tracing by other processes": _c("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0),
    "become another user": lambda: os.setuid(os.getuid()),
    **{
        f"bpf command {each}": _c("syscall", NUMBERS["bpf"], each, None, 0)
        for each in range(BPF_COMMANDS)
        if each not in MAP_COMMANDS
    },
}
"""Operations that are refused on every kernel. None does harm if a kernel allows it by
mistake."""

MOUNT = find() or Mount("/sys/fs/cgroup", "/")


def _list_all_cgroups() -> None:
    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # the cgroup was removed meanwhile
            raise error

    assert all(os.walk(MOUNT.point, onerror=fail))


LISTING: Mapping[str, Callable[[], object]] = {
    "list the root cgroup": lambda: list(Path(MOUNT.point).iterdir()),
    "list all cgroups": _list_all_cgroups,
}
"""Operations that finding the owners of connections requires."""

READING: Mapping[str, Callable[[], object]] = {
    "read a file": Path("/etc/passwd").read_bytes,
    "read the program's own files": Path(__file__).read_bytes,
    "read /proc of another process": Path("/proc/1/status").read_bytes,
    "read a file of a cgroup": (Path(MOUNT.point) / "cgroup.procs").read_bytes,
    "list a directory": lambda: list(Path("/etc").iterdir()),
}
"""Operations that are allowed on a kernel without Landlock."""


def _systemds() -> socket.socket | None:
    """Return the datagram socket for notifications to systemd; None if there is no such
    socket."""
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=int(each.name))
            if (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_DGRAM):
                return found
            found.detach()
    return None


def _pass_on(sock: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        socket.recv_fds(theirs, 1, 1)


def _misuse(sock: socket.socket) -> Mapping[str, Callable[[], object]]:
    elsewhere = "/run/systemd/journal/socket"
    fileno = sock.fileno()
    message = struct.pack("PQ", 0, 0)  # no address and no data
    return {
        "send elsewhere": lambda: sock.sendto(b"x", elsewhere),
        "send a message elsewhere": lambda: sock.sendmsg([b"x"], [], 0, elsewhere),
        "send a message without an address": _c("sendmsg", fileno, message + bytes(40), 0),
        "send with a descriptor above 32 bits": _c(
            "syscall", NUMBERS["sendmsg"], fileno + (1 << 32), message + bytes(40), 0
        ),
        "pass the socket to another process": lambda: _pass_on(sock),
        "duplicate the socket with fcntl": lambda: fcntl.fcntl(
            fileno, fcntl.F_DUPFD_CLOEXEC, 0
        ),
        "duplicate the socket with dup": lambda: os.dup(fileno),
        "connect the socket elsewhere": lambda: sock.connect(elsewhere),
    }


def serve() -> None:
    """Run the exporter; the page ``/attempts`` has the outcome of each attempt as JSON."""
    pages.App = _App  # type: ignore[misc]
    main()


class _App(pages.App):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._pages = {**self._pages, "/attempts": _attempts, "/other-abi": _other_abi}


async def _attempts(_request: http1.Request) -> http1.Response:
    acts = {**REFUSED, **READING, **LISTING}
    if sock := _systemds():
        acts |= _misuse(sock)
    outcomes = {name: _outcome(act) for name, act in acts.items()}
    if sock:
        sock.detach()
    return http1.text(200, json.dumps(outcomes))


def _outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return DONE


async def _other_abi(_request: http1.Request) -> http1.Response:
    _libc.syscall(ctypes.c_long(X32_GETPID))
    return http1.text(200, f"the system call did not cause {signal.SIGSYS.name}")
