# SPDX-License-Identifier: GPL-3.0-only
"""Standard error that no process reads; each test starts another Python process."""

import contextlib
import fcntl
import os
import pty
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import DEADLINE_S

LINE_LENGTH = len(f"line {0:05} {'x' * 60}")

PROGRAM = """
import sys
from tcpexporter.host import stderr
raw = stderr.replace()
for number in range(20011):
    sys.stderr.write(f"line {number:05} {'x' * 60}\\n")
sys.stderr.write("y" * 10007 + "\\n")
print(raw.dropped, flush=True)
sys.stdin.read(1)
sys.stderr.write("the last line\\n")
"""


def pipe() -> tuple[int, int]:
    return os.pipe()


def pair() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def run(descriptor: int) -> subprocess.Popen[bytes]:
    """Run the program, which writes 1.4 MB to standard error before it reads anything."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=descriptor,
    )


def wait_for_dropped(running: subprocess.Popen[bytes]) -> int:
    assert running.stdout
    readable, _, _ = select.select([running.stdout], [], [], DEADLINE_S)
    assert readable, "the program is blocked by its standard error"
    return int(running.stdout.readline())


@pytest.mark.parametrize("opened", [pipe, pair, pty.openpty])
def test_a_stalled_reader_does_not_block_the_writer(
    opened: Callable[[], tuple[int, int]],
) -> None:
    """In a pipe, a socket or a terminal, lines that do not fit are dropped; later lines are
    not.

    O_NONBLOCK is not set, because other processes may write to the same file.
    """
    ours, theirs = opened()
    with run(theirs) as running:
        flags = fcntl.fcntl(theirs, fcntl.F_GETFL)
        os.close(theirs)
        try:
            assert wait_for_dropped(running) > 1009
            os.set_blocking(ours, False)
            shown = drain(ours)
            assert running.stdin
            running.stdin.write(b"\n")
            running.stdin.close()
            assert running.wait(DEADLINE_S) == 0
            shown += drain(ours)
        finally:
            running.kill()
            os.close(ours)
    assert not flags & os.O_NONBLOCK
    *lines, last = shown.splitlines()
    assert last == "the last line"
    whole = [each for each in lines if len(each) == LINE_LENGTH]
    assert len(whole) > 53
    # The kernel may free space in a terminal in between, so there can be gaps. Lines are in
    # order, and an incomplete line is the beginning of a whole one.
    assert whole == sorted(set(whole))
    assert all(f"{each[:10]:0<10} {'x' * 60}".startswith(each) for each in lines)


def drain(descriptor: int) -> str:
    text = b""
    with contextlib.suppress(BlockingIOError, OSError):
        while piece := os.read(descriptor, 1 << 20):
            text += piece
    return text.decode()


def test_a_file_is_written_from_its_current_position(tmp_path: Path) -> None:
    """All lines are written after the present content; they exceed the capacity of a
    pipe."""
    path = tmp_path / "log"
    with path.open("w") as file:
        file.write("before\n")
        file.flush()
        with run(file.fileno()) as running:
            running.communicate(b"\n", timeout=DEADLINE_S)
    lines = path.read_text().splitlines()
    assert len(lines) == 20014
    assert (lines[0], lines[-1]) == ("before", "the last line")
    assert lines[-2] == "y" * 10007
