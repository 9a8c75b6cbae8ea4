# SPDX-License-Identifier: GPL-3.0-only
"""Starts the child processes, which inherit nothing of the exporter's environment."""

import socket
import subprocess
import sys
from typing import IO


def start(
    module: str, channel: socket.socket, *arguments: str, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Run a module of the exporter in another Python.

    It has the root directory as its own, so it works where the current one was deleted or
    cannot be read: paths in ``arguments`` must be absolute. It has no environment variable,
    and of the open descriptors only the channel and the standard ones.

    Args:
        module: what to run, with a descriptor of the channel as its first argument.
        channel: what the child shares with the exporter.
        arguments: what follows.
        output: where the child's standard output and error go; None: where ours do.

    Raises:
        OSError: the kernel refuses another process.
    """
    return subprocess.Popen(
        # -I: no module of the current directory or of PYTHONPATH is run as root.
        [sys.executable, "-I", "-m", module, str(channel.fileno()), *arguments],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env={},
    )
