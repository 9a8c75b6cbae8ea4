# SPDX-License-Identifier: GPL-3.0-only
"""Checks that only the exporter's user has access to a file or directory; locks it."""

import fcntl
import os
import stat
from pathlib import Path

from tcpexporter.errors import TcpExporterError


def require_own(path: Path, status: os.stat_result, error: type[TcpExporterError]) -> None:
    """Refuse a file or directory that another user could have written.

    Args:
        path: its path, for the message.
        status: its status. To use the file afterwards, get the status from its descriptor.
        error: the class of the exception.

    Raises:
        TcpExporterError: it belongs to another user, or its mode gives other users access.
    """
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = "0700" if stat.S_ISDIR(status.st_mode) else "0600"
        raise error(
            f"{path} is accessible to other users, so it cannot be trusted: choose another"
            f" path; or set its mode to {mode}, and its owner to the user that starts the"
            " exporter"
        )


def lock(
    path: Path, descriptor: int, error: type[TcpExporterError], *, setting: str
) -> None:
    """Lock a file or directory until the descriptor is closed: flock(2).

    Args:
        path: its path, for the message.
        descriptor: its descriptor.
        error: the class of the exception.
        setting: the flag that chooses another path, for the message.

    Raises:
        TcpExporterError: another process has locked it.
        OSError: the kernel refuses the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(
            f"{path} is in use by another exporter: stop that one, or choose another path"
            f" with {setting}"
        ) from None
