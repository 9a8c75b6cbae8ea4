# SPDX-License-Identifier: GPL-3.0-only
"""Standard error that no process reads; each test runs another Python."""

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
    """The program, which writes 1.4 MB there before it reads anything."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=descriptor,
    )


def wait_for_dropped(running: subprocess.Popen[bytes]) -> int:
    assert running.stdout
    readable, _, _ = select.select([running.stdout], [], [], DEADLINE_S)
    assert readable, "it waits for its standard error to be read"
    return int(running.stdout.readline())


@pytest.mark.parametrize("opened", [pipe, pair, pty.openpty])
def test_nobody_waits_for_a_reader_that_has_stalled(
    opened: Callable[[], tuple[int, int]],
) -> None:
    """A pipe, a socket and a terminal: what does not fit is dropped, later lines are not.

    Nor is O_NONBLOCK set for other processes that write there.
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
    # The kernel can make room in a terminal meanwhile, so there may be gaps: no line is
    # out of its order, and each that is torn is the beginning of one.
    assert whole == sorted(set(whole))
    assert all(f"{each[:10]:0<10} {'x' * 60}".startswith(each) for each in lines)


def drain(descriptor: int) -> str:
    text = b""
    with contextlib.suppress(BlockingIOError, OSError):
        while piece := os.read(descriptor, 1 << 20):
            text += piece
    return text.decode()


def test_a_file_is_written_on_from_where_it_is(tmp_path: Path) -> None:
    """All of it, longer than a pipe takes at once, behind what is there."""
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
