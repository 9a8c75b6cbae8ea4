# SPDX-License-Identifier: GPL-3.0-only
"""Native code in daemon threads; each test starts another Python process."""

import subprocess
import sys

PROGRAM = """
import asyncio
import sys
import bcrypt
from tcpexporter.host import daemon_threads

def check_forever():
    while True:
        bcrypt.checkpw(b"x", b"$2b$04$" + b"." * 53)

async def run():
    for _ in range(4):
        daemon_threads.in_thread(check_forever)
    await asyncio.sleep(0.05)

asyncio.run(run())
daemon_threads.exit_if_running(7)
sys.exit(7)
"""


def test_the_exit_code_is_kept_while_native_code_runs() -> None:
    """Without `exit_if_running` Python would abort in one case of three."""
    for _ in range(12):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (7, "")


def test_without_native_code_the_process_continues() -> None:
    """`exit_if_running` does nothing then."""
    program = (
        "from tcpexporter.host import daemon_threads; daemon_threads.exit_if_running(7);"
        " print('after')"
    )
    assert subprocess.check_output([sys.executable, "-c", program]) == b"after\n"
