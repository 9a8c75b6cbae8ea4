# SPDX-License-Identifier: GPL-3.0-only
"""Writes to standard output, and reports when that fails."""

import os
import sys

from tcpexporter.errors import ServerError


def write(content: bytes) -> None:
    """Write the whole content at once.

    Raises:
        ServerError: standard output is closed, or cannot be written to.
    """
    if sys.stdout is None:
        raise ServerError("cannot write to standard output: it is closed")
    left = content
    try:
        # Without Python's buffer: when Python exits it writes the rest of the buffer, and
        # would report the same error again.
        while left:
            left = left[os.write(sys.stdout.fileno(), left) :]
    except OSError as error:
        raise ServerError(f"cannot write to standard output: {error.strerror}") from error
