# SPDX-License-Identifier: GPL-3.0-only
"""Gives up root for good."""

import contextlib
import ctypes
import errno
import logging
import os
import pwd
from collections.abc import Callable
from pathlib import Path

from tcpexporter.errors import PrivilegeError, TcpExporterError

log = logging.getLogger(__name__)

CAP_DAC_READ_SEARCH = 2
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39

# include/uapi/linux/prctl.h
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def find_user(name: str) -> pwd.struct_passwd:
    """The account to become.

    Raises:
        PrivilegeError: there is none of that name, or it is root's.
    """
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise PrivilegeError(f"there is no user {name!r}: choose one with --user") from None
    if account.pw_uid == 0:
        raise PrivilegeError(
            f"user {name!r} is root: choose an unprivileged one with --user"
        )
    return account


def may_use_bpf() -> bool:
    """Whether this process may load a BPF program of a tracepoint."""
    effective = _effective()
    return bool(
        effective >> CAP_SYS_ADMIN & 1
        or (effective >> CAP_BPF & 1 and effective >> CAP_PERFMON & 1)
    )


def _effective() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))


def keep_reading(account: pwd.struct_passwd | None) -> None:
    """Lose everything but what it takes to read files: CAP_DAC_READ_SEARCH.

    Root without that one, as in some containers, stays root without a capability: it
    can still read what is root's own.

    Args:
        account: as `drop` has it.

    Raises:
        PrivilegeError: the kernel refuses a step.
    """
    if _effective() >> CAP_DAC_READ_SEARCH & 1:
        _become(account, (CAP_DAC_READ_SEARCH,))
    else:
        _become(None, ())


def drop(account: pwd.struct_passwd | None, needed: Callable[[], object]) -> None:
    """Lose every capability and the way back to any.

    Capabilities belong to a thread: call this while there is one alone.

    Args:
        account: whose uid and gid to take; None when not root.
        needed: an operation that must still work afterwards. Where it does not without
            CAP_BPF, that one is kept: `features.UNPRIVILEGED_MAPS`.

    Raises:
        PrivilegeError: the kernel refuses a step.
    """
    kept = () if works_without(account, needed) else (CAP_BPF,)
    if kept:
        log.warning("keeping CAP_BPF: this kernel does not let go of it for reading a map")
    _become(account, kept)


def works_without(account: pwd.struct_passwd | None, needed: Callable[[], object]) -> bool:
    """Whether a child that has dropped everything can do what is needed.

    Args:
        account: as `drop` has it.
        needed: raises TcpExporterError or OSError where it cannot be done.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    outcome = 1
    with contextlib.suppress(TcpExporterError, OSError):
        _become(account, ())
        needed()
        outcome = 0
    os._exit(outcome)


def _become(account: pwd.struct_passwd | None, kept: tuple[int, ...]) -> None:
    try:
        _clear_bounding_set()
        if account:
            _prctl(PR_SET_KEEPCAPS, int(bool(kept)))
            os.setgroups([])
            os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
            os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        _set_capabilities(kept)
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise PrivilegeError(f"cannot give up root: {error.strerror}") from error


def _clear_bounding_set() -> None:
    """Takes CAP_SETPCAP; an unprivileged start without it can lose nothing."""
    capability = 0
    try:
        while True:
            _prctl(PR_CAPBSET_DROP, capability)
            capability += 1
    except OSError as error:
        if (
            error.errno == errno.EINVAL and capability
        ):  # past the last that the kernel knows
            return
        if error.errno == errno.EPERM and os.geteuid() != 0:
            return
        raise


def _set_capabilities(kept: tuple[int, ...]) -> None:
    bits = sum(1 << capability for capability in kept)
    data = (_Data * 2)(*(_Data(half, half, 0) for half in (bits & 0xFFFFFFFF, bits >> 32)))
    header = _Header(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), data))


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, *(ctypes.c_ulong(each) for each in (argument, 0, 0, 0))))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
