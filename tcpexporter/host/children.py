# SPDX-License-Identifier: GPL-3.0-only
"""Starts child processes that inherit no environment variable of the exporter."""

import socket
import subprocess
import sys
from typing import IO


def start(
    module: str, channel: socket.socket, *arguments: str, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Run a module of the exporter in another Python process.

    The child's current directory is the root directory, because the exporter's own
    directory may be deleted or unreadable. So paths in ``arguments`` must be absolute. The
    child has no environment variables, and no descriptors except the channel and the
    standard streams.

    Args:
        module: the module to run; its first argument is the channel's descriptor.
        channel: the child's end of a socket pair.
        arguments: the other arguments.
        output: the file for the child's standard output and error; None: those of this
            process.

    Returns:
        The running process.

    Raises:
        OSError: the kernel refuses another process.
    """
    return subprocess.Popen(
        # -I: as root, Python must not import modules from the current directory or
        # PYTHONPATH.
        [sys.executable, "-I", "-m", module, str(channel.fileno()), *arguments],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env={},
    )
