# SPDX-License-Identifier: GPL-3.0-only
"""Guests end with their parent process, and disruptive tests only run in guests."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import eventually
from tests.vm import ROOT, foreign

EMULATOR = """#!/bin/sh
echo $$ >"$PIDS/new"
mv "$PIDS/new" "$PIDS/pid"
exec sleep 600
"""

RUN = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.vm import guest
from tests.vm.architectures import AMD64
from tests.vm.kernels import Unpacked
share = Path({share!r})
kernel = Unpacked(AMD64, share, share, share)
with ThreadPoolExecutor() as testing:
    testing.submit(guest.run, kernel, share, share, "", log=share / "log")
"""


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        # an empty state means that it has ended
        return Path(f"/proc/{process}/cmdline").read_text() != ""
    return False


def test_a_guest_ends_with_its_parent_process(tmp_path: Path) -> None:
    """The parent is killed. The emulator of this test writes its process id, and waits."""
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


def test_an_unpacked_guest_runs_the_exporter_of_its_own_tree(tmp_path: Path) -> None:
    """No file of its virtual environment refers to the tree of the host."""
    foreign._fill_venv(tmp_path, "3.11", lambda *_options: None)
    found = [each for each in tmp_path.rglob("*") if not each.is_symlink()]
    texts = [each.read_text() for each in found if each.is_file()]
    assert any("'/tcpexporter/tcpexporter'" in each for each in texts)
    assert ROOT == foreign.TREE or not any(f"{ROOT}/" in each for each in texts)


def test_disruptive_tests_run_in_guests_only() -> None:
    """Importing them anywhere else raises an error."""
    with pytest.raises(RuntimeError, match="suspend the machine"):
        importlib.import_module("tests.vm.faults")
