# SPDX-License-Identifier: GPL-3.0-only
"""Restricts which files this process can use, by Landlock: landlock(7)."""

import contextlib
import logging
import os
import struct

from tcpexporter.host import libc, namespaces

log = logging.getLogger(__name__)

# include/uapi/asm-generic/unistd.h; the same on every architecture except alpha
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

# include/uapi/linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR = 1 << 3
LANDLOCK_ACCESS_FS_FIRST = (1 << 13) - 1
"""Every operation on files that version 1 of Landlock can restrict."""
LANDLOCK_ACCESS_FS_REFER = 1 << 13
LANDLOCK_ACCESS_FS_TRUNCATE = 1 << 14
LANDLOCK_ACCESS_FS_IOCTL_DEV = 1 << 15
LANDLOCK_ACCESS_NET_BIND_TCP = 1 << 0
LANDLOCK_ACCESS_NET_CONNECT_TCP = 1 << 1
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
LANDLOCK_SCOPE_SIGNAL = 1 << 1

RULESET = struct.Struct("=QQQ")
"""struct landlock_ruleset_attr: three sets of operations.

The first two are operations on files and on the network: they are refused unless a rule
allows them. The third is operations on other processes: they reach only processes of the
same ruleset.
"""
PATH_BENEATH = struct.Struct("=Qi")
"""struct landlock_path_beneath_attr: the allowed operations, and a directory."""


def abi_version() -> int:
    """Return the version of Landlock in the kernel; 0: not supported or not enabled."""
    try:
        return libc.system_call(
            LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def restrict_files(cgroups: int | None = None) -> bool:
    """Refuse access to all files except those that serving reads.

    Args:
        cgroups: the descriptor of a directory, if there is one. Listing it, and the
            directories below it, stays permitted; reading files there is refused.

    Returns:
        Whether the restriction is in force. If not, the log says why.
    """
    abi = abi_version()
    if not abi:
        # Not a warning: on many kernels an operator cannot enable it.
        log.debug("Landlock disabled: this kernel or container does not support it")
        return False
    try:
        _load_ruleset(RULESET.pack(*_refused(abi)), cgroups)
    except OSError as error:
        log.warning("Landlock disabled: the kernel refuses it: %s", error.strerror)
        return False
    return True


def _load_ruleset(refused: bytes, cgroups: int | None) -> None:
    ruleset = libc.system_call(LANDLOCK_CREATE_RULESET, refused, len(refused), 0)
    try:
        # The process_* metrics read files in /proc/PID. The descriptor stays open: the rule
        # names the directory's inode, and the kernel may replace that inode when no process
        # has the directory open.
        own = os.open("/proc/self", os.O_PATH)
        _allow(ruleset, own, LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR)
        # Not /run/netns: ip-netns(8) creates that directory with the first name.
        with contextlib.suppress(FileNotFoundError):
            above = os.open(namespaces.NAMED.parent, os.O_PATH)
            _allow(ruleset, above, LANDLOCK_ACCESS_FS_READ_DIR)
            os.close(above)
        if cgroups is not None:
            _allow(ruleset, cgroups, LANDLOCK_ACCESS_FS_READ_DIR)
        libc.system_call(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _refused(abi: int) -> tuple[int, int, int]:
    """Return the fields of `RULESET` that a version of Landlock supports.

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
    libc.system_call(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
