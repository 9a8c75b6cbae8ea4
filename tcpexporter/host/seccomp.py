# SPDX-License-Identifier: GPL-3.0-only
"""Restricts which system calls this process can make: seccomp(2).

A refused system call fails with EPERM. The filter does not kill the process. A later
version of Python or of the C library may try a system call and continue if it fails. No
refusal is logged: an attacker's code could fill the log.
"""

import logging
import os
import platform
import struct
from collections.abc import Iterator
from errno import EFAULT, ENOSYS, EPERM
from fcntl import F_GETFD, F_GETFL, F_SETFD, F_SETFL
from mmap import PROT_EXEC
from socket import AF_UNIX, MSG_FASTOPEN, SOCK_STREAM
from typing import IO, Any, NamedTuple

from tcpexporter.host import libc

log = logging.getLogger(__name__)

MACHINES = ("x86_64", "aarch64")
"""Architectures for which the lists below are known to be complete."""

LIBSECCOMP = "libseccomp.so.2"

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
"""The commands of bpf(2) that only use maps by their descriptors."""

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
"""``struct sock_fprog``: the number of instructions, and their address."""
INSTRUCTION_BYTES = 8

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

ALLOWED = (
    # open files, and the attributes of files that are not open
    *("read", "readv", "pread64", "write", "writev", "lseek", "close", "getdents64"),
    *("fstat", "newfstatat", "stat", "lstat", "statx", "readlink", "readlinkat", "getcwd"),
    # open sockets, and connections of clients
    *("accept", "accept4", "listen", "recvfrom", "shutdown"),
    *("getpeername", "getsockname", "getsockopt", "setsockopt"),
    # waiting
    *("epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
    *("poll", "ppoll", "select", "pselect6", "eventfd2", "pipe2"),
    *("nanosleep", "clock_nanosleep", "restart_syscall"),
    # reading certificates again, and waiting for the process that reads them
    *("memfd_create", "wait4", "waitid"),
    # memory and threads
    *("brk", "mremap", "munmap", "madvise", "futex", "set_robust_list", "rseq", "exit"),
    *("exit_group", "sched_yield", "sched_getaffinity", "getcpu"),
    # signals
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    # the time, ids, and resource usage
    *("clock_gettime", "clock_getres", "gettimeofday", "time", "getrandom", "uname"),
    *("getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid"),
    *("getrlimit", "getrusage", "times", "sysinfo"),
)
"""System calls that serving makes, with any arguments.

Some are alternatives: the architecture, the C library and Python decide which are made.
"""


class Condition(NamedTuple):
    """A condition on an argument (counted from 0): its bits in ``mask`` equal ``value``."""

    argument: int
    mask: int
    value: int


def _is(argument: int, value: int) -> Condition:
    """Return the condition that the lower 32 bits of an argument equal ``value``."""
    return Condition(argument, 0xFFFFFFFF, value)


def _is_null(argument: int) -> Condition:
    return Condition(argument, 0xFFFFFFFFFFFFFFFF, 0)


def _is_not(argument: int, value: int) -> Iterator[Condition]:
    """Yield 32 conditions; at least one is met if the argument is not ``value``."""
    for bit in (1 << each for each in range(32)):
        yield Condition(argument, bit, ~value & bit)


def _conditional(
    process: int, connected: int | None
) -> Iterator[tuple[str, *tuple[Condition, ...]]]:
    """Yield the system calls that serving makes only with certain arguments."""
    for command in MAP_COMMANDS:
        yield "bpf", _is(0, command)
    for request in (FIOCLEX, FIONBIO, TCGETS):
        yield "ioctl", _is(1, request)
    # F_SETOWN is missing: the kernel sends signals to the owner of a descriptor. F_DUPFD is
    # missing: see sendmsg.
    for command in (F_GETFD, F_SETFD, F_GETFL, F_SETFL):
        yield "fcntl", _is(1, command)
    # Opening is allowed only for reading; Landlock restricts which files.
    yield "open", Condition(1, WRITING, 0)
    yield "openat", Condition(2, WRITING, 0)
    # Memory must not be executable.
    yield "mmap", Condition(2, PROT_EXEC, 0)
    yield "mprotect", Condition(2, PROT_EXEC, 0)
    # A new thread but no new process, and no signal to another process.
    yield "clone", Condition(0, CLONE_THREAD, CLONE_THREAD)
    yield "kill", _is(0, process)
    yield "tgkill", _is(0, process)
    yield "prctl", _is(0, PR_SET_NAME)
    yield "prlimit64", _is_null(2)
    # socketpair(2) only for streams: the datagram sockets of a pair can send to any
    # address. sendto(2) only without an address and without TCP Fast Open: both can reach
    # other hosts.
    yield "socketpair", _is(0, AF_UNIX), Condition(1, SOCK_TYPE_MASK, SOCK_STREAM)
    yield "sendto", _is_null(4)
    no_connecting = Condition(2, MSG_FASTOPEN, 0)
    if connected is None:
        yield "sendmsg", no_connecting
    else:
        # The address of sendmsg(2) is in memory, which a filter cannot read. So sendmsg(2)
        # is refused on systemd's socket. No other descriptor can refer to that socket: the
        # filter refuses dup(2), and recvmsg(2), which can receive descriptors.
        for is_other in _is_not(0, connected):
            yield "sendmsg", is_other, no_connecting


def has_filters() -> bool:
    """Return whether the kernel supports filters: then a null pointer fails with EFAULT."""
    try:
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None)
    except OSError as error:
        return error.errno == EFAULT
    return False


def make_filter(connected: int | None) -> bytes:
    """Compile the filter; to be called before root is given up.

    Root alone may be able to read the modules that this imports.

    Args:
        connected: the descriptor of a connected unix datagram socket, if there is one. It
            can still send to its peer, but not to other sockets.

    Returns:
        The instructions, an array of struct sock_filter. Empty: there can be no filter, and
        the log says why.
    """
    if platform.machine() not in MACHINES:
        return _disabled(f"there is no list of system calls for {platform.machine()}")
    if not has_filters():
        return _disabled("this kernel or container does not support filters")
    ours, theirs = os.pipe()
    try:
        child = os.fork()  # the library uses 1 MiB of memory, in the child only
    except OSError as error:
        os.close(ours)
        os.close(theirs)
        return _disabled(
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
        return _disabled(f"the process that makes the filter ended with {exit_code}")
    return code


def _write_filter(connected: int | None, channel: IO[bytes]) -> None:
    try:
        library = _import_library()
        _system_calls(library, os.getppid(), connected).export_bpf(channel)
    except ImportError as error:
        _disabled(
            "install the Python package pyseccomp, or the distribution's python3-seccomp"
            f" or python3-libseccomp ({error})"
        )
    except (AttributeError, OSError, RuntimeError) as error:
        _disabled(f"install the distribution's libseccomp2 or libseccomp ({error})")


def _import_library() -> Any:
    """Import one of the two Python bindings of libseccomp, in the child only.

    Their interfaces are the same. pyseccomp is in the package index, with a hash in
    deploy/lock. Distributions have libseccomp's own binding, the module seccomp.

    Raises:
        ImportError: neither of them is installed.
        OSError: libseccomp, which pyseccomp requires, is not installed.
        AttributeError: libseccomp is too old for pyseccomp.
    """
    try:
        _name_library()
        import pyseccomp as library  # noqa: PLC0415
    except ModuleNotFoundError:
        import seccomp as library  # noqa: PLC0415
    return library


def _name_library() -> None:
    """Let pyseccomp load libseccomp by the name that the dynamic linker knows.

    pyseccomp calls `ctypes.util.find_library`, which requires ldconfig or a compiler. A
    minimal system has neither.
    """
    import ctypes.util  # noqa: PLC0415  only the child imports it

    ctypes.util.find_library = {"seccomp": LIBSECCOMP}.get  # type: ignore[assignment]


def _system_calls(library: Any, process: int, connected: int | None) -> Any:
    """Return the filter, a ``SyscallFilter`` of the library."""
    made = library.SyscallFilter(library.ERRNO(EPERM))
    # In the ABI of another architecture (x32, i386) the same number is another system call.
    made.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
    conditional = _conditional(process, connected)
    for name, *conditions in [*((name,) for name in ALLOWED), *conditional]:
        number = library.resolve_syscall(library.Arch.NATIVE, name)
        if number >= 0:  # the architecture has it, and libseccomp knows it
            tests = [
                library.Arg(argument, library.MASKED_EQ, mask, value)
                for argument, mask, value in conditions
            ]
            made.add_rule(library.ALLOW, number, *tests)
    # The flags of clone3 are in memory, which a filter cannot read. With ENOSYS the C
    # library uses clone(2) instead.
    made.add_rule(library.ERRNO(ENOSYS), "clone3")
    return made


def load_filter(code: bytes) -> bool:
    """Refuse every system call that serving does not make.

    Returns:
        Whether the filter is in force. If not, the log says why.
    """
    address, referenced = libc.address_of(code)
    program = PROGRAM.pack(len(code) // INSTRUCTION_BYTES, address)
    try:
        libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)
    except OSError as error:
        _disabled(f"the kernel refuses the filter: {error.strerror}")
        return False
    finally:
        del referenced
    return True


def _disabled(reason: str) -> bytes:
    log.warning("seccomp disabled: %s", reason)
    return b""
