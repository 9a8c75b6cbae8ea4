# SPDX-License-Identifier: GPL-3.0-only
"""Drops every privilege that the serving process does not need.

An attacker who runs code in the process has the rights of an unprivileged user, with three
further limits:

- `privileges.drop`: the process can never regain root;
- `landlock`: it can only read its own files in /proc and list /run, where network
  namespaces have their names. If connections have owners, it can also list the directories
  of the cgroup file system, but read no file there. If the kernel supports it, the process
  cannot connect to TCP ports or abstract unix sockets, and cannot send signals to other
  processes;
- `seccomp`: it can make only the listed system calls.

Objects that were opened before stay open: the maps of the BPF program, the netlink sockets,
the listening sockets, the file of --state, systemd's socket. No other file can be opened
afterwards, so every module that serving requires must be imported before.
"""

import os
import pwd
import time
from collections.abc import Callable

from tcpexporter.errors import PrivilegeError
from tcpexporter.host import landlock, privileges, seccomp


def confine(
    account: pwd.struct_passwd | None,
    needed: Callable[[], object],
    code: bytes,
    *,
    cgroups: int | None = None,
) -> dict[str, bool]:
    """Give up root permanently, then every other right that serving does not require.

    The limits apply to the calling thread and to the threads that it starts later. So call
    this while the process has only one thread.

    Args:
        account: as in `privileges.drop`.
        needed: as in `privileges.drop`.
        code: of `seccomp.make_filter`.
        cgroups: as in `landlock.restrict_files`.

    Returns:
        Whether each limit is in force, by its value of the label ``by`` of
        tcpexporter_confined.

    Raises:
        PrivilegeError: `privileges.drop` has failed; or the process is still root, and
            neither Landlock nor seccomp protects root's files from it.
        TcpExporterError: ``needed`` has failed.
    """
    # Without TZ, the C library would check /etc/localtime for each line of the log.
    os.environ.setdefault("TZ", ":/etc/localtime")
    time.tzset()
    privileges.drop(account, needed)
    files = landlock.restrict_files(cgroups)
    system_calls = bool(code) and seccomp.load_filter(code)
    left = privileges.read_status()
    if 0 in left.uids and not (files or system_calls):
        raise PrivilegeError(
            "still root, which can write root's files and so regain every privilege: add"
            " CAP_SETUID, start as an unprivileged user, or install libseccomp"
        )
    return {
        "seccomp": system_calls and left.seccomp == seccomp.SECCOMP_MODE_FILTER,
        "landlock": files,
        "unprivileged_user": left.is_given_up(account),
        "no_capabilities": not left.permitted,
    }
