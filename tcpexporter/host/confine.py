# SPDX-License-Identifier: GPL-3.0-only
"""Leaves to the process that serves only what serving takes.

Whoever gets it to run code of theirs has an unprivileged user's rights, and three walls:

- `privileges.drop`: there is no way back to root;
- Landlock: of all files it can read its own in /proc, and list /run, where namespaces have
  their names; where the kernel has it, it can connect and send signals to nobody, too;
- seccomp: of all system calls it can make those that are listed here.

What is opened before that stays open: the maps of the BPF program, the sockets that the
socket tables are read from, the ports, the file of --state, systemd's socket. Nothing that
reads other files may come after it: importing a module does, so everything is imported by
then.

A system call that is refused fails with EPERM. It would be as safe to kill the process,
but what a later Python or C library may try is nearly always something that it can do
without, and somebody who tries system calls one after another gains nothing. No refusal is
logged: whoever is in there could fill the log.
"""

import contextlib
import ctypes
import logging
import os
import platform
import pwd
import struct
import time
from collections.abc import Callable, Iterator
from errno import EFAULT, ENOSYS, EPERM
from fcntl import F_GETFD, F_GETFL, F_SETFD, F_SETFL
from mmap import PROT_EXEC
from socket import AF_UNIX, MSG_FASTOPEN, SOCK_STREAM
from typing import IO, Any, NamedTuple

from tcpexporter.errors import PrivilegeError
from tcpexporter.host import namespaces, privileges

log = logging.getLogger(__name__)

MACHINES = ("x86_64", "aarch64")
"""Whose system calls are known to be listed."""

LIBSECCOMP = "libseccomp.so.2"

_libc = ctypes.CDLL(None, use_errno=True)


def confine(
    account: pwd.struct_passwd | None,
    needed: Callable[[], object],
    connected: int | None = None,
) -> dict[str, bool]:
    """Give up root for good, and then whatever else is not for serving.

    All of it belongs to a thread, and to those that it starts: call this while there is
    one alone.

    Args:
        account: as `privileges.drop` has it.
        needed: likewise.
        connected: a descriptor of a unix datagram socket, if there is one. It may send to
            whom it is connected to, and to nobody else.

    Returns:
        What confines the process, and whether it is in force: the label ``by`` of
        tcpexporter_confined.

    Raises:
        PrivilegeError: as `privileges.drop` has it; or the process is still root, and
            neither Landlock nor seccomp keeps it from root's files.
        TcpExporterError: as ``needed`` raises it.
    """
    # Or the C library would look at that file for each line of the log.
    os.environ.setdefault("TZ", ":/etc/localtime")
    time.tzset()
    code = _make_filter(connected)  # as root, who can read what that takes
    privileges.drop(account, needed)
    landlock = _restrict_files()
    seccomp = bool(code) and _load_filter(code)
    left = privileges.read_status()
    if 0 in left.uids and not (landlock or seccomp):
        raise PrivilegeError(
            "still root, which can write root's files and so get every privilege back: add"
            " CAP_SETUID, start as an unprivileged user, or have libseccomp installed"
        )
    return {
        "seccomp": seccomp and left.seccomp == SECCOMP_MODE_FILTER,
        "landlock": landlock,
        "unprivileged_user": left.is_given_up(account),
        "no_capabilities": not left.permitted,
    }


# --- Landlock: landlock(7) ---

# include/uapi/asm-generic/unistd.h, the same on every architecture of MACHINES
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

# include/uapi/linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR = 1 << 3
LANDLOCK_ACCESS_FS_FIRST = (1 << 13) - 1
"""All that can be done to files as far as the first version knows."""
LANDLOCK_ACCESS_FS_REFER = 1 << 13
LANDLOCK_ACCESS_FS_TRUNCATE = 1 << 14
LANDLOCK_ACCESS_FS_IOCTL_DEV = 1 << 15
LANDLOCK_ACCESS_NET_BIND_TCP = 1 << 0
LANDLOCK_ACCESS_NET_CONNECT_TCP = 1 << 1
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
LANDLOCK_SCOPE_SIGNAL = 1 << 1

RULESET = struct.Struct("=QQQ")
"""What is refused unless a rule allows it: of files, of the network, and what is scoped."""
PATH_BENEATH = struct.Struct("=Qi")


def landlock_abi() -> int:
    """The version of Landlock that the kernel has; 0: none, or it was not turned on."""
    try:
        return _landlock(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def _restrict_files() -> bool:
    """Refuse what serving does not read; whether that is in force."""
    abi = landlock_abi()
    if not abi:
        # No warning: on many kernels an operator can do nothing about it.
        log.debug("Landlock disabled: this kernel, or what it runs in, does not support it")
        return False
    try:
        _load_ruleset(RULESET.pack(*_refused(abi)))
    except OSError as error:
        log.warning("Landlock disabled: the kernel refuses it: %s", error.strerror)
        return False
    return True


def _load_ruleset(refused: bytes) -> None:
    ruleset = _landlock(LANDLOCK_CREATE_RULESET, refused, len(refused), 0)
    try:
        # For the process_* metrics. It stays open: the kernel makes another inode of the
        # directory when nobody has it, and the rule is for this one.
        own = os.open("/proc/self", os.O_PATH)
        _allow(ruleset, own, LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR)
        # Not the directory itself: ip-netns(8) makes it with the first name.
        with contextlib.suppress(FileNotFoundError):
            above = os.open(namespaces.NAMED.parent, os.O_PATH)
            _allow(ruleset, above, LANDLOCK_ACCESS_FS_READ_DIR)
            os.close(above)
        _landlock(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _refused(abi: int) -> tuple[int, int, int]:
    """As `RULESET` has it, what each version knows: landlock(7).

    TCP since Linux kernel commit fff69fb03dde ("landlock: Support network rules with TCP
    bind and connect") (in v6.7), signals since 54a6e6bbf3be ("landlock: Add signal
    scoping") (in v6.12).
    """
    files, network, scoped = LANDLOCK_ACCESS_FS_FIRST, 0, 0
    if abi >= 2:
        files |= LANDLOCK_ACCESS_FS_REFER
    if abi >= 3:
        files |= LANDLOCK_ACCESS_FS_TRUNCATE
    if abi >= 4:
        network = LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP
    if abi >= 5:
        files |= LANDLOCK_ACCESS_FS_IOCTL_DEV
    if abi >= 6:
        scoped = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL
    return files, network, scoped


def _allow(ruleset: int, directory: int, access: int) -> None:
    rule = PATH_BENEATH.pack(access, directory)
    _landlock(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)


def _landlock(number: int, *arguments: int | bytes | None) -> int:
    """The C library has no function for these."""
    passed = (
        ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each)
        for each in arguments
    )
    result: int = _libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- seccomp: seccomp(2) ---

# include/uapi/linux/bpf.h
BPF_MAP_LOOKUP_ELEM = 1
BPF_MAP_UPDATE_ELEM = 2
BPF_MAP_DELETE_ELEM = 3
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_MAP_LOOKUP_AND_DELETE_ELEM = 21
BPF_MAP_LOOKUP_BATCH = 24
BPF_MAP_LOOKUP_AND_DELETE_BATCH = 25
BPF_MAP_UPDATE_BATCH = 26
BPF_MAP_DELETE_BATCH = 27

MAP_COMMANDS = (
    BPF_MAP_LOOKUP_ELEM,
    BPF_MAP_UPDATE_ELEM,
    BPF_MAP_DELETE_ELEM,
    BPF_OBJ_GET_INFO_BY_FD,
    BPF_MAP_LOOKUP_AND_DELETE_ELEM,
    BPF_MAP_LOOKUP_BATCH,
    BPF_MAP_LOOKUP_AND_DELETE_BATCH,
    BPF_MAP_UPDATE_BATCH,
    BPF_MAP_DELETE_BATCH,
)
"""Those on descriptors, which make no other."""

# include/uapi: linux/prctl.h, linux/seccomp.h, linux/sched.h, asm-generic/ioctls.h
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
CLONE_THREAD = 0x00010000
TCGETS = 0x5401
FIONBIO = 0x5421
FIOCLEX = 0x5451
SOCK_TYPE_MASK = 0xF

PROGRAM = struct.Struct("@HP")
"""``struct sock_fprog``: how many instructions, and where they are."""
INSTRUCTION_BYTES = 8

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

ALLOWED = (
    # files that are open, and finding out about others
    *("read", "readv", "pread64", "write", "writev", "lseek", "close", "getdents64"),
    *("fstat", "newfstatat", "stat", "lstat", "statx", "readlink", "readlinkat", "getcwd"),
    # sockets that are there, and whoever connects to them
    *("accept", "accept4", "listen", "recvfrom", "shutdown"),
    *("getpeername", "getsockname", "getsockopt", "setsockopt"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
    *("poll", "ppoll", "select", "pselect6", "eventfd2", "pipe2"),
    *("nanosleep", "clock_nanosleep", "restart_syscall"),
    # certificates that are read again, and the end of the child that reads them
    *("memfd_create", "wait4", "waitid"),
    # memory and threads
    *("brk", "mremap", "munmap", "madvise", "futex", "set_robust_list", "rseq", "exit"),
    *("exit_group", "sched_yield", "sched_getaffinity", "getcpu"),
    # signals
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    # what time it is, who it is and what it has used
    *("clock_gettime", "clock_getres", "gettimeofday", "time", "getrandom", "uname"),
    *("getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid"),
    *("getrlimit", "getrusage", "times", "sysinfo"),
)
"""System calls that are made in serving, whatever their arguments.

For some there is more than one: which of them is made depends on the architecture, the C
library and Python.
"""


class Condition(NamedTuple):
    """Of an argument, counted from 0, the bits in ``mask`` are ``value``."""

    argument: int
    mask: int
    value: int


def _is(argument: int, value: int) -> Condition:
    """The kernel looks at no more of these arguments than an int has."""
    return Condition(argument, 0xFFFFFFFF, value)


def _is_null(argument: int) -> Condition:
    return Condition(argument, 0xFFFFFFFFFFFFFFFF, 0)


def _is_not(argument: int, value: int) -> Iterator[Condition]:
    """One of these is met: a bit is another. The kernel looks at no more bits, as above."""
    for bit in (1 << each for each in range(32)):
        yield Condition(argument, bit, ~value & bit)


def _conditional(
    process: int, connected: int | None
) -> Iterator[tuple[str, *tuple[Condition, ...]]]:
    """System calls that are made in serving, with what is so whenever they are."""
    for command in MAP_COMMANDS:
        yield "bpf", _is(0, command)
    for request in (FIOCLEX, FIONBIO, TCGETS):
        yield "ioctl", _is(1, request)
    # Not F_SETOWN: a descriptor's owner is sent signals. Not F_DUPFD: see sendmsg.
    for command in (F_GETFD, F_SETFD, F_GETFL, F_SETFL):
        yield "fcntl", _is(1, command)
    # Only for reading; Landlock says what.
    yield "open", Condition(1, WRITING, 0)
    yield "openat", Condition(2, WRITING, 0)
    # No code but what is there.
    yield "mmap", Condition(2, PROT_EXEC, 0)
    yield "mprotect", Condition(2, PROT_EXEC, 0)
    # No process but this one.
    yield "clone", Condition(0, CLONE_THREAD, CLONE_THREAD)
    yield "kill", _is(0, process)
    yield "tgkill", _is(0, process)
    yield "prctl", _is(0, PR_SET_NAME)
    yield "prlimit64", _is_null(2)
    # To no address: a pair's datagrams can be sent to others, TCP Fast Open connects.
    yield "socketpair", _is(0, AF_UNIX), Condition(1, SOCK_TYPE_MASK, SOCK_STREAM)
    yield "sendto", _is_null(4)
    no_connecting = Condition(2, MSG_FASTOPEN, 0)
    if connected is None:
        yield "sendmsg", no_connecting
    else:
        # Its addresses lie in memory, where no filter looks. There is no way to another
        # descriptor of the same socket: no dup(2), and no recvmsg(2), which takes one that
        # was sent.
        for is_other in _is_not(0, connected):
            yield "sendmsg", is_other, no_connecting


def has_filters() -> bool:
    """Whether the kernel takes filters: then one at no address is a bad address."""
    return _prctl_seccomp(None) != 0 and ctypes.get_errno() == EFAULT


def _make_filter(connected: int | None) -> bytes:
    """The filter as the kernel takes it; empty where there can be none, which is logged."""
    if platform.machine() not in MACHINES:
        return _without_filter(f"there is no list of system calls for {platform.machine()}")
    if not has_filters():
        return _without_filter("the kernel, or what it runs in, does not support filters")
    ours, theirs = os.pipe()
    try:
        child = os.fork()  # which the library's memory goes with: 1 MiB
    except OSError as error:
        os.close(ours)
        os.close(theirs)
        return _without_filter(
            f"cannot start the process that makes the filter: {error.strerror}"
        )
    if not child:
        outcome = 1
        try:
            with os.fdopen(theirs, "wb") as channel:
                _write_filter(connected, channel)
            outcome = 0
        finally:
            os._exit(outcome)
    os.close(theirs)
    with os.fdopen(ours, "rb") as channel:
        code = channel.read()
    if exit_code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        return _without_filter(f"the process that makes the filter ended with {exit_code}")
    return code


def _without_filter(reason: str) -> bytes:
    log.warning("seccomp disabled: %s", reason)
    return b""


def _write_filter(connected: int | None, channel: IO[bytes]) -> None:
    try:
        _have_library()
        _system_calls(os.getppid(), connected).export_bpf(channel)
    except ImportError as error:
        _without_filter(f"install the Python package pyseccomp ({error})")
    except (AttributeError, OSError, RuntimeError) as error:
        _without_filter(f"install the distribution's libseccomp2 or libseccomp ({error})")


def _have_library() -> None:
    """Let pyseccomp load libseccomp as everything else does: by its name.

    It asks `ctypes.util.find_library`, which needs ldconfig or a compiler, and a minimal
    system has neither.

    Raises:
        OSError: it is not installed.
    """
    import ctypes.util  # noqa: PLC0415  only the child holds it

    ctypes.CDLL(LIBSECCOMP)
    ctypes.util.find_library = {"seccomp": LIBSECCOMP}.get  # type: ignore[assignment]


def _system_calls(process: int, connected: int | None) -> Any:
    """The filter as libseccomp has it.

    Raises:
        ImportError: pyseccomp is not installed.
        AttributeError: libseccomp is too old for it.
    """
    import pyseccomp  # noqa: PLC0415  only the child may hold it

    made = pyseccomp.SyscallFilter(pyseccomp.ERRNO(EPERM))
    # As on another architecture, where the same numbers are other calls: x32, i386.
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    conditional = _conditional(process, connected)
    for name, *conditions in [*((name,) for name in ALLOWED), *conditional]:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        if number >= 0:  # the architecture has it, and the library knows
            tests = [
                pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value)
                for argument, mask, value in conditions
            ]
            made.add_rule(pyseccomp.ALLOW, number, *tests)
    # Its flags lie in memory, where no filter looks; the C library then tries clone.
    made.add_rule(pyseccomp.ERRNO(ENOSYS), "clone3")
    return made


def _load_filter(code: bytes) -> bool:
    """Refuse what serving does not call; whether that is in force."""
    instructions = ctypes.create_string_buffer(code, len(code))
    count = len(code) // INSTRUCTION_BYTES
    program = PROGRAM.pack(count, ctypes.addressof(instructions))
    if _prctl_seccomp(program):
        _without_filter(f"the kernel refuses the filter: {os.strerror(ctypes.get_errno())}")
        return False
    return True


def _prctl_seccomp(program: bytes | None) -> int:
    result: int = _libc.prctl(
        PR_SET_SECCOMP,
        ctypes.c_ulong(SECCOMP_MODE_FILTER),
        ctypes.c_char_p(program),
        ctypes.c_ulong(0),
        ctypes.c_ulong(0),
    )
    return result
