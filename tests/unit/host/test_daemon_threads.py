# SPDX-License-Identifier: GPL-3.0-only
"""Threads in foreign code, each time in a Python of its own."""

import subprocess
import sys

PROGRAM = """
import asyncio
import sys
import bcrypt
from tcpexporter.host import daemon_threads as foreign

def check_for_ever():
    while True:
        bcrypt.checkpw(b"x", b"$2b$04$" + b"." * 53)

async def run():
    for _ in range(4):
        foreign.in_thread(check_for_ever)
    await asyncio.sleep(0.05)

asyncio.run(run())
foreign.leave(7)
sys.exit(7)
"""


def test_an_end_while_they_are_at_work_is_clean() -> None:
    """The exit code is ours, not that of an abort, which it is one time in three else."""
    for _ in range(12):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (7, "")


def test_without_them_the_end_is_pythons() -> None:
    """Nothing ends when nobody is at work."""
    program = (
        "from tcpexporter.host import daemon_threads; daemon_threads.leave(7);"
        " print('after')"
    )
    assert subprocess.check_output([sys.executable, "-c", program]) == b"after\n"
