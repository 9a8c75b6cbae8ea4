# SPDX-License-Identifier: GPL-3.0-only
"""Requires that a file or directory belongs to this exporter alone, and locks it."""

import fcntl
import os
import stat
from pathlib import Path

from tcpexporter.errors import TcpExporterError


def require_own(path: Path, status: os.stat_result, error: type[TcpExporterError]) -> None:
    """Refuse what another user could have written.

    Args:
        path: of the file or directory, for the message.
        status: of it, from an open descriptor if it is used afterwards.
        error: the class of what is raised.

    Raises:
        TcpExporterError: it belongs to another user, or its mode gives others access.
    """
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = "0700" if stat.S_ISDIR(status.st_mode) else "0600"
        raise error(
            f"{path} is not ours alone, so its content cannot be trusted: it requires mode"
            f" {mode}, and as its owner the user that starts the exporter"
        )


def lock(
    path: Path, descriptor: int, error: type[TcpExporterError], *, setting: str
) -> None:
    """Lock it for this process until the descriptor is closed: flock(2).

    Args:
        path: of the file or directory, for the message.
        descriptor: of it.
        error: the class of what is raised.
        setting: the flag that chooses another path.

    Raises:
        TcpExporterError: another process has locked it.
        OSError: it cannot be locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(
            f"{path} is in use by another exporter: stop that one, or choose another path"
            f" with {setting}"
        ) from None
