# SPDX-License-Identifier: GPL-3.0-only
"""The child that loads the BPF program, and what may happen to it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import DEADLINE_S


def wait_for_loader(parent: int) -> int:
    """The process id of the child that loads, as soon as the parent has it."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        # Not there yet, or the child is gone again.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, children.read_text().split()):
                if (
                    b"tcpexporter.ebpf.loader"
                    in Path(f"/proc/{child}/cmdline").read_bytes()
                ):
                    return child
        time.sleep(0.001)
    raise AssertionError("it has no loader")


def kill_loader(parent: int, after_s: float) -> None:
    """Kill the child that loads when it has been there for so long."""
    child = wait_for_loader(parent)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):  # it has done its work meanwhile
        os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def loader_is_killed(after_s: float) -> Iterator[None]:
    """In this block the child of this process is killed, when it has been there so long."""
    killer = threading.Thread(target=kill_loader, args=(os.getpid(), after_s))
    killer.start()
    try:
        yield
    finally:
        killer.join()
