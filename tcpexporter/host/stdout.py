# SPDX-License-Identifier: GPL-3.0-only
"""Writes to standard output, and reports when that fails."""

import os
import sys

from tcpexporter.errors import ServerError


def write(content: bytes) -> None:
    """Write all of it at once.

    Raises:
        ServerError: it is closed, or cannot be written to.
    """
    if sys.stdout is None:
        raise ServerError("cannot write to standard output: it is closed")
    left = content
    try:
        # Not through Python's buffer: when Python ends it writes what is left there, and
        # would report the same error again.
        while left:
            left = left[os.write(sys.stdout.fileno(), left) :]
    except OSError as error:
        raise ServerError(f"cannot write to standard output: {error.strerror}") from error
