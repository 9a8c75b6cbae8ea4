# SPDX-License-Identifier: GPL-3.0-only
"""Gives up root permanently, and checks in /proc/self/status that no privilege remains."""

import contextlib
import logging
import os
import pwd
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tcpexporter.errors import (
    PrivilegeError,
    SettingsError,
    TcpExporterError,
    quoted,
    reason,
)
from tcpexporter.host import libc

log = logging.getLogger(__name__)

# include/uapi/linux/capability.h
CAP_DAC_READ_SEARCH = 2
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39

NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID"),
    *("SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST"),
    *("NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
    *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE"),
    *("AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM"),
    *("BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)
"""The capabilities by their number, without ``CAP_``."""

LONGEST_LIST = 6
"""Maximum number of capabilities that a message lists; of more, it has only the number."""

# include/uapi/linux/prctl.h, securebits.h
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS = 27
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECBIT_KEEP_CAPS = 1 << 4


class Status(NamedTuple):
    """The privileges of this process, as the kernel reports them: proc_pid_status(5).

    A set of capabilities is a number with a bit for each.
    """

    uids: tuple[int, ...]
    """The real, effective, saved and file system user ids."""
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    permitted: int
    effective: int
    bounding: int
    no_new_privs: bool
    seccomp: int
    """The seccomp mode; 2: a filter is in force, ours or that of the parent process."""

    def holds(self, *capabilities: int) -> bool:
        """Return whether all of these capabilities are in effect."""
        wanted = _bits(*capabilities)
        return self.effective & wanted == wanted

    def is_given_up(self, account: pwd.struct_passwd | None) -> bool:
        """Return whether all user and group ids are those of the account.

        Without an account: whether no user id is root's.
        """
        if account is None:
            return 0 not in self.uids
        ids = (account.pw_uid, account.pw_gid)
        return {*self.uids} == {ids[0]} and {*self.gids, *self.groups} == {ids[1]}


def read_status() -> Status:
    """Return the present privileges of this process.

    Raises:
        PrivilegeError: /proc/self/status cannot be read or parsed.
    """
    try:
        text = Path("/proc/self/status").read_text(errors="replace")
    except OSError as error:
        raise PrivilegeError(
            f"cannot read /proc/self/status ({error.strerror}): mount /proc"
        ) from error
    fields = {
        name: value.split()
        for name, _, value in (line.partition(":") for line in text.splitlines())
    }
    try:
        uids, gids, groups = (
            tuple(map(int, fields[each])) for each in ("Uid", "Gid", "Groups")
        )
        permitted, effective, bounding = (
            int(fields[each][0], 16) for each in ("CapPrm", "CapEff", "CapBnd")
        )
        no_new_privs = fields["NoNewPrivs"] == ["1"]
        # A kernel without seccomp does not have this line.
        seccomp = int(fields.get("Seccomp", ["0"])[0])
    except (KeyError, IndexError, ValueError) as error:
        raise PrivilegeError(
            f"cannot check the privileges of this process: /proc/self/status has no valid"
            f" {error}"
        ) from error
    return Status(uids, gids, groups, permitted, effective, bounding, no_new_privs, seccomp)


def names(capabilities: int) -> str:
    """Return the names of a set of capabilities, for a message."""
    each = [number for number in range(64) if capabilities >> number & 1]
    if len(each) > LONGEST_LIST:
        return f"{len(each)} capabilities"
    return ", ".join(
        f"CAP_{NAMES[number]}" if number < len(NAMES) else f"capability {number}"
        for number in each
    )


def is_root() -> bool:
    """Return whether any user id of the process is root's: then it can become root."""
    return 0 in os.getresuid()


def find_account(name: str) -> pwd.struct_passwd | None:
    """Return the account to switch to; None: this process is not root.

    Raises:
        SettingsError: no user has that name, or it is root's.
    """
    return find_user(name) if is_root() else None


def find_user(name: str) -> pwd.struct_passwd:
    """Return the account of an unprivileged user.

    Raises:
        SettingsError: no user has that name, or it is root's.
    """
    try:
        account = pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: no user can have such a name
        raise SettingsError(
            f"there is no user {quoted(name)}: choose one with --user", setting="user"
        ) from None
    if account.pw_uid == 0:
        raise SettingsError(
            f"user {quoted(name)} is root: choose an unprivileged one with --user",
            setting="user",
        )
    return account


def may_use_bpf() -> bool:
    """Return whether this process has the capabilities to load a tracepoint's BPF program.

    Raises:
        PrivilegeError: /proc/self/status cannot be read or parsed.
    """
    status = read_status()
    return status.holds(CAP_SYS_ADMIN) or status.holds(CAP_BPF, CAP_PERFMON)


def keep_reading(account: pwd.struct_passwd | None) -> None:
    """Give up every privilege except reading all files: CAP_DAC_READ_SEARCH.

    Where that capability cannot be kept, as in some containers, the process keeps its user
    and has no capabilities. If that user is root, it can still read root's own files.

    Args:
        account: the user to switch to; None: the process is not root.

    Raises:
        PrivilegeError: another capability, or a way to regain one, would remain.
    """
    kept = _bits(CAP_DAC_READ_SEARCH)
    if read_status().permitted & kept and (account is None or _can_keep_capabilities()):
        _become(account, kept)
    else:
        _become(None, 0)


def drop(account: pwd.struct_passwd | None, needed: Callable[[], object]) -> None:
    """Give up every capability and every way to regain one, as far as the kernel allows.

    One warning lists the privileges that cannot be given up because a capability is
    missing. Capabilities belong to a thread: call this while the process has only one.

    Args:
        account: the user to switch to; None: the process is not root.
        needed: a function that must still work afterwards; it raises TcpExporterError if it
            does not work. If it requires CAP_BPF, that capability is kept:
            `features.UNPRIVILEGED_MAPS`.

    Raises:
        PrivilegeError: a capability, or a way to regain one, would remain.
        TcpExporterError: ``needed`` does not work even with all privileges.
    """
    before = read_status()
    left = _become(account, _choose_kept(account, needed))
    if account:
        _warn_of_privileges_left(account, before, left)


def _choose_kept(account: pwd.struct_passwd | None, needed: Callable[[], object]) -> int:
    """Return the capabilities to keep: none, or CAP_BPF."""
    if works_with(0, account, needed):
        return 0
    kept = _bits(CAP_BPF)
    if works_with(kept, account, needed):
        log.warning("keeping CAP_BPF, which this kernel requires for reading a BPF map")
        return kept
    # Neither set of capabilities is enough. If ``needed`` works in this process, the cause
    # is the error below. Otherwise one of these two calls raises the cause.
    needed()
    _become(account, 0)
    raise PrivilegeError(
        "this kernel requires CAP_BPF for reading a BPF map, and it cannot be kept: start "
        "with CAP_BPF and CAP_PERFMON and not only with CAP_SYS_ADMIN, and without locked "
        "securebits, or use --source sock_diag"
    )


def works_with(
    kept: int, account: pwd.struct_passwd | None, needed: Callable[[], object]
) -> bool:
    """Return whether ``needed`` works in a child process with only these capabilities.

    Args:
        kept: the set of capabilities.
        account: the user to switch to; None: the process is not root.
        needed: a function that raises TcpExporterError or OSError if it does not work.

    Raises:
        PrivilegeError: the kernel refuses another process.
    """
    try:
        child = os.fork()
    except OSError as error:
        raise PrivilegeError(
            f"cannot start a process, which giving up root requires: {reason(error)}"
        ) from error
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    outcome = 1
    try:
        with contextlib.suppress(TcpExporterError, OSError):
            _become(account, kept)
            needed()
            outcome = 0
    finally:
        os._exit(outcome)


def _become(account: pwd.struct_passwd | None, kept: int) -> Status:
    """Give up all privileges except ``kept`` that the kernel allows; return what remains.

    Raises:
        PrivilegeError: a dangerous privilege would remain.
    """
    for step in _steps(account, kept, read_status().permitted):
        with contextlib.suppress(OSError):  # checked below
            step()
    left = read_status()
    if left.permitted & ~kept:
        raise PrivilegeError(
            f"cannot give up {names(left.permitted & ~kept)}: the kernel refuses capset(2):"
            " allow it in the seccomp filter of the container or service"
        )
    if kept & ~left.effective:
        raise PrivilegeError(f"cannot keep {names(kept)}: start without locked securebits")
    if not left.no_new_privs:
        raise PrivilegeError(
            "cannot set no_new_privs, so a program could regain privileges: allow prctl(2)"
            " in the seccomp filter of the container or service"
        )
    return left


def _steps(
    account: pwd.struct_passwd | None, kept: int, permitted: int
) -> Iterator[Callable[[], object]]:
    """Yield the system calls that give up privileges, in the order to make them.

    Only the calls that change the bounding set and the ids require capabilities:
    capabilities(7).
    """
    yield partial(libc.capset, permitted, permitted, 0)  # makes all of them effective
    yield _clear_bounding_set
    if account:
        uid, gid = account.pw_uid, account.pw_gid
        yield partial(libc.prctl, PR_SET_KEEPCAPS, int(bool(kept)))
        yield partial(os.setgroups, [])
        yield partial(os.setresgid, gid, gid, gid)
        yield partial(os.setresuid, uid, uid, uid)
    yield partial(libc.prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    yield partial(libc.capset, kept, kept, 0)
    yield partial(libc.prctl, PR_SET_NO_NEW_PRIVS, 1)


def _warn_of_privileges_left(
    account: pwd.struct_passwd, before: Status, left: Status
) -> None:
    stays = []
    if {*left.uids} != {account.pw_uid}:
        stays.append((CAP_SETUID, f"user {_listed(left.uids)}"))
    if {*left.gids, *left.groups} != {account.pw_gid}:
        stays.append((CAP_SETGID, f"group {_listed(left.gids + left.groups)}"))
    if left.bounding:
        bounding = f"{names(left.bounding)} in the bounding set, harmless with no_new_privs"
        stays.append((CAP_SETPCAP, bounding))
    if not stays:
        return
    missing = _bits(*(each for each, _ in stays)) & ~before.permitted
    remedy = "outside of the seccomp filter or user namespace that refuses it"
    log.warning(
        "some privileges could not be given up: %s; start the exporter %s, or as an"
        " unprivileged user",
        "; ".join(f"{what} ({_why(capability, missing)})" for capability, what in stays),
        f"with {names(missing)} as well" if missing else remedy,
    )


def _why(capability: int, missing: int) -> str:
    name = names(_bits(capability))
    if missing & _bits(capability):
        return f"{name} is missing"
    return f"refused despite {name}, by a seccomp filter or in a user namespace"


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted({*ids})))


def _can_keep_capabilities() -> bool:
    """Return whether root can keep capabilities after a change of user: capabilities(7)."""
    with contextlib.suppress(OSError):
        libc.prctl(PR_SET_KEEPCAPS, 1)
        return True
    with contextlib.suppress(OSError):
        bits = libc.prctl(PR_GET_SECUREBITS)
        return bool(bits & (SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP))
    return False


def _clear_bounding_set() -> None:
    for capability in range(64):  # the kernel refuses the first one that it does not know
        libc.prctl(PR_CAPBSET_DROP, capability)


def _bits(*capabilities: int) -> int:
    return sum(1 << each for each in capabilities)
