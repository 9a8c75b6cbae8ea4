# SPDX-License-Identifier: GPL-3.0-only
"""The child of an exporter that loads the BPF program."""

import contextlib
import subprocess
import time
from pathlib import Path

from tests.support import DEADLINE_S


def wait_for_loader(process: subprocess.Popen[str]) -> int:
    """The process id of the child, as soon as it is there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                if b"tcpexporter.loader" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        time.sleep(0.001)
    raise AssertionError("it has no loader")
