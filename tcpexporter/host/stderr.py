# SPDX-License-Identifier: GPL-3.0-only
"""Standard error that nobody has to read: what cannot be written at once is dropped."""

import contextlib
import io
import os
import select
import stat
import sys
from typing import Any

DESCRIPTOR = 2


class Stderr(io.RawIOBase):
    """The descriptor of standard error, without ever waiting for who reads it.

    Its O_NONBLOCK is left alone: other processes share that. A pipe or a terminal is opened
    anew instead, where that is permitted. Of a pipe that was not, another process could
    take the room after `poll` has found it.
    """

    def __init__(self) -> None:
        """Open it anew if that can be done; a file would be written to from its start."""
        super().__init__()
        self.dropped = 0
        """How many times something was not written, or only the beginning of it."""
        self._descriptor = DESCRIPTOR
        self._is_torn = False
        with contextlib.suppress(OSError):
            mode = os.fstat(DESCRIPTOR).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._descriptor = os.open(f"/proc/self/fd/{DESCRIPTOR}", flags)

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """That of standard error, so that isatty(3) is right."""
        return DESCRIPTOR

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return os.isatty(DESCRIPTOR)

    def write(self, data: Any, /) -> int:
        """Write it, or drop what does not fit now; returns the length of ``data``."""
        whole = memoryview(data).cast("B")
        # What was torn before ends with its line.
        left = memoryview(b"\n" + bytes(whole)) if self._is_torn else whole
        began = len(left)
        with contextlib.suppress(OSError):
            while left and self._has_room():
                left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]
        if left:
            self.dropped += 1
        if len(left) < began:
            self._is_torn = bool(left)
        return len(whole)

    def _has_room(self) -> bool:
        """Whether a write of up to PIPE_BUF bytes is done at once: pipe(7)."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in waiting.poll(0))


def replace() -> Stderr:
    """Have everything that Python writes to standard error go this way."""
    raw = Stderr()
    sys.stderr = io.TextIOWrapper(
        raw,
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )
    return raw
