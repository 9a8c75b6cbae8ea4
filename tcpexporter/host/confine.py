# SPDX-License-Identifier: GPL-3.0-only
"""Drops every privilege that the serving process does not need.

An attacker who runs code in the process has the rights of an unprivileged user, and three
further limits:

- `privileges.drop`: no way leads back to root;
- `landlock`: it can read its own files in /proc and list /run, where network namespaces
  have their names; where the kernel supports it, it cannot connect to other processes or
  send them signals either;
- `seccomp`: it can make only the listed system calls.

What was opened before stays open: the maps of the BPF program, the sockets that report the
socket tables, the listening sockets, the file of --state, systemd's socket. No other file
can be opened afterwards, so every module that serving needs must be imported before.
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
    connected: int | None = None,
) -> dict[str, bool]:
    """Give up root permanently, then everything else that serving does not need.

    The limits belong to a thread, and to those that it starts later: call this while the
    process has only one thread.

    Args:
        account: as in `privileges.drop`.
        needed: as in `privileges.drop`.
        connected: a connected unix datagram socket, if there is one. It can still send to
            its peer, and to nothing else.

    Returns:
        The limits, and whether each is in force: the label ``by`` of tcpexporter_confined.

    Raises:
        PrivilegeError: as in `privileges.drop`; or the process is still root, and neither
            Landlock nor seccomp protects root's files from it.
        TcpExporterError: as ``needed`` raises it.
    """
    # Otherwise the C library would look up this file for each line of the log.
    os.environ.setdefault("TZ", ":/etc/localtime")
    time.tzset()
    # Before root is given up: only root may be able to read what this imports.
    code = seccomp.make_filter(connected)
    privileges.drop(account, needed)
    files = landlock.restrict_files()
    system_calls = bool(code) and seccomp.load_filter(code)
    left = privileges.read_status()
    if 0 in left.uids and not (files or system_calls):
        raise PrivilegeError(
            "still root, which can write root's files and so get every privilege back: add"
            " CAP_SETUID, start as an unprivileged user, or have libseccomp installed"
        )
    return {
        "seccomp": system_calls and left.seccomp == seccomp.SECCOMP_MODE_FILTER,
        "landlock": files,
        "unprivileged_user": left.is_given_up(account),
        "no_capabilities": not left.permitted,
    }
