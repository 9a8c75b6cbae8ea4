# SPDX-License-Identifier: GPL-3.0-only
"""Starts child processes, which inherit no environment variable of the exporter."""

import socket
import subprocess
import sys
from typing import IO


def start(
    module: str, channel: socket.socket, *arguments: str, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Run a module of the exporter in another Python process.

    Its current directory is the root directory, so it works even if ours was deleted or
    cannot be read: paths in ``arguments`` must be absolute. It has no environment variable,
    and no open descriptor except the channel and the standard streams.

    Args:
        module: the module to run; its first argument is the channel's descriptor.
        channel: the child's end of a socket pair.
        arguments: the other arguments.
        output: where the child's standard output and error go; None: where ours go.

    Returns:
        The running process.

    Raises:
        OSError: the kernel refuses another process.
    """
    return subprocess.Popen(
        # -I: Python must not import modules from the current directory or PYTHONPATH as
        # root.
        [sys.executable, "-I", "-m", module, str(channel.fileno()), *arguments],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env={},
    )
