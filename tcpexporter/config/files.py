# SPDX-License-Identifier: GPL-3.0-only
"""Opens and reads configuration files of limited size."""

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from tcpexporter.errors import SettingsError

LARGEST_BYTES = 1 << 20
"""Maximum size of a file. A bundle of all public certificate authorities has 256 KiB."""


def expanded(path: str) -> Path:
    """Return the path; a tilde at its start is replaced by the home directory."""
    with contextlib.suppress(RuntimeError):  # there is no such user
        return Path(path).expanduser()
    return Path(path)


def open_file(path: str | Path, *, wait: bool) -> BinaryIO:
    """Open a file for reading.

    Args:
        path: the path of the file.
        wait: if the file is a pipe, whether to wait for a process that writes to it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the path contains a NUL byte.
    """
    return os.fdopen(os.open(path, os.O_RDONLY | (0 if wait else os.O_NONBLOCK)), "rb")


def read_all(file: BinaryIO, *, only_regular: bool) -> bytes:
    """Return the content of an open file.

    Args:
        file: from `open_file`.
        only_regular: whether to refuse pipes and devices.

    Raises:
        SettingsError: the file is too large, or is not a regular file.
        OSError: the file cannot be read.
    """
    if only_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise SettingsError("it is not a regular file")
    content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise SettingsError(f"it is larger than {LARGEST_BYTES} bytes")
    return content


def reason(error: OSError | ValueError | SettingsError) -> str:
    """Return why a file cannot be read; if permission is missing, also the remedy."""
    if isinstance(error, PermissionError):
        return f"{error.strerror}: let user {os.geteuid()} read it, or start as root"
    return str(error.strerror if isinstance(error, OSError) else error)
