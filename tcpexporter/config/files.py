# SPDX-License-Identifier: GPL-3.0-only
"""Opens and reads configuration files, up to a limit of size."""

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from tcpexporter.errors import SettingsError

LARGEST_BYTES = 1 << 20
"""Of a file; a bundle of all public certificate authorities has a quarter of that."""


def expanded(path: str) -> Path:
    """The path with the home directory in place of a tilde."""
    with contextlib.suppress(RuntimeError):  # there is no such user
        return Path(path).expanduser()
    return Path(path)


def open_file(path: str | Path, *, wait: bool) -> BinaryIO:
    """Open a file for reading.

    Args:
        path: of the file.
        wait: whether to wait for a process that writes to it, if it is a pipe.

    Raises:
        OSError: it cannot be opened.
        ValueError: no file can have this path.
    """
    return os.fdopen(os.open(path, os.O_RDONLY | (0 if wait else os.O_NONBLOCK)), "rb")


def read_all(file: BinaryIO, *, only_regular: bool) -> bytes:
    """The content of an open file.

    Args:
        file: from `open_file`.
        only_regular: whether to refuse pipes and devices.

    Raises:
        SettingsError: it is too large, or not a regular file.
        OSError: it cannot be read.
    """
    if only_regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise SettingsError("it is not a regular file")
    content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise SettingsError(f"it is larger than {LARGEST_BYTES} bytes")
    return content


def reason(error: OSError | ValueError | SettingsError) -> str:
    """Why a file cannot be read, with the remedy if permission is missing."""
    if isinstance(error, PermissionError):
        return f"{error.strerror}: let user {os.geteuid()} read it, or start as root"
    return str(error.strerror if isinstance(error, OSError) else error)
