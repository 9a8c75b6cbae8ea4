# SPDX-License-Identifier: GPL-3.0-only
"""Finds and kills the loader, the child process that loads the BPF program."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import DEADLINE_S


def wait_for_loader(parent: int) -> int:
    """Wait until a process has a loader, and return the loader's process id."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        # The loader has not started, or has ended.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, children.read_text().split()):
                if (
                    b"tcpexporter.ebpf.loader"
                    in Path(f"/proc/{child}/cmdline").read_bytes()
                ):
                    return child
        time.sleep(0.001)
    raise AssertionError("the process has no loader")


def kill_loader(parent: int, after_s: float) -> None:
    """Kill the loader of a process after this number of seconds."""
    child = wait_for_loader(parent)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # it has already ended
        os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def loader_is_killed(after_s: float) -> Iterator[None]:
    """Kill the loader of this process during the block, after this number of seconds."""
    killer = threading.Thread(target=kill_loader, args=(os.getpid(), after_s))
    killer.start()
    try:
        yield
    finally:
        killer.join()
