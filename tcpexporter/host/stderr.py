# SPDX-License-Identifier: GPL-3.0-only
"""Writes to standard error without waiting: lines that would block are dropped."""

import contextlib
import io
import os
import select
import stat
import sys
import time
from typing import Any

DESCRIPTOR = 2


class Stderr(io.RawIOBase):
    """Standard error, without waiting for the process that reads it.

    The descriptor does not get O_NONBLOCK, because other processes share that flag.
    Instead, a pipe or a terminal is opened again, where that is permitted. If a pipe
    cannot be opened again, a write can still block: another process may fill the pipe
    after `poll`.
    """

    def __init__(self) -> None:
        """Open a pipe or terminal again, but not a file: that would overwrite its start."""
        super().__init__()
        self.dropped = 0
        """Number of lines that were dropped, completely or in part."""
        self._descriptor = DESCRIPTOR
        self._is_torn = False
        with contextlib.suppress(OSError):
            mode = os.fstat(DESCRIPTOR).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._descriptor = os.open(f"/proc/self/fd/{DESCRIPTOR}", flags)

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of standard error."""
        return DESCRIPTOR

    def isatty(self) -> bool:
        """Return whether standard error is a terminal."""
        return os.isatty(DESCRIPTOR)

    def write(self, data: Any, /) -> int:
        """Write ``data``, or drop the part that would block; return its full length."""
        whole = memoryview(data).cast("B")
        # If only a part of the previous line was written, end that line first.
        left = memoryview(b"\n" + bytes(whole)) if self._is_torn else whole
        began = len(left)
        with contextlib.suppress(OSError):
            while left and self._can_write():
                left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]
        if left:
            self.dropped += 1
        if len(left) < began:
            self._is_torn = bool(left)
        return len(whole)

    def _can_write(self) -> bool:
        """Return whether a write of up to PIPE_BUF bytes does not block: pipe(7)."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in waiting.poll(0))


def replace() -> Stderr:
    """Make Python write to standard error through a new `Stderr`, and return that."""
    raw = Stderr()
    sys.stderr = io.TextIOWrapper(
        raw,
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )
    return raw


def count_down(duration_s: int, label: str) -> None:
    """Wait ``duration_s`` seconds; on a terminal, show the remaining time."""
    for left_s in range(duration_s, 0, -1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{label}, {left_s} s left \033[K")
        time.sleep(1)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
