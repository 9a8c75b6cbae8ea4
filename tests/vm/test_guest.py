# SPDX-License-Identifier: GPL-3.0-only
"""What guests are to this machine: they end with who runs them, and keep to themselves."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import eventually

EMULATOR = """#!/bin/sh
echo $$ >"$PIDS/new"
mv "$PIDS/new" "$PIDS/pid"
exec sleep 600
"""

RUN = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.vm import guest
from tests.vm.kernels import Unpacked
share = Path({share!r})
kernel = Unpacked(share, share, share)
with ThreadPoolExecutor() as testing:
    testing.submit(guest.run, kernel, share, share, "", log=share / "log")
"""


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/cmdline").read_text() != ""  # empty: it has ended
    return False


def test_a_guest_ends_with_who_runs_it(tmp_path: Path) -> None:
    """However that ends; the emulator here only says who it is, and waits."""
    emulator = tmp_path / "qemu-system-x86_64"
    emulator.write_text(EMULATOR)
    emulator.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PIDS": str(tmp_path)}
    share = tmp_path / "share"
    share.mkdir()
    command = [sys.executable, "-c", RUN.format(share=str(share))]
    with subprocess.Popen(command, env=environment) as runner:
        eventually((tmp_path / "pid").exists)
        guest = int((tmp_path / "pid").read_text())
        assert is_running(guest)
        runner.kill()
    eventually(lambda: not is_running(guest))


def test_faults_are_for_guests_alone() -> None:
    """Where there is no guest, not one of these tests can be had."""
    with pytest.raises(RuntimeError, match="suspends the machine"):
        importlib.import_module("tests.vm.faults")
