# SPDX-License-Identifier: GPL-3.0-only
"""If the loader fails, dies or cannot be started, one sentence has the reason."""

import errno
import os
import re
import resource
import sys
from pathlib import Path

import pytest

from tcpexporter.ebpf import loader, loading
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.errors import LoadError
from tests.unit.ebpf.test_loader_protocol import open_descriptors


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EPERM, "BCC cannot .* 64 KiB are allowed: LimitMEMLOCK"),
        (
            errno.ENOMEM,
            "^out of memory while compiling; the exporter requires about 76 MiB",
        ),
        (None, "^BCC cannot compile the BPF program \\(no\\), .* its output$"),
    ],
)
def test_the_limit_that_refuses_the_largest_map_is_named(
    number: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BCC only reports a failed compilation; creating the same map again shows the errno.

    The limit is that of locked memory before Linux 5.11, and that of the cgroup since.
    """

    def create_map(_kind: int, _key: int, _value: int, *, entries: int) -> int:
        assert entries == 1009
        if number:
            raise OSError(number, os.strerror(number))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(loader, "create_map", create_map)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert re.search(
        said, loader._why_not_compiled(Exception("no"), Request(1009, 0, (0, 0)))
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -9 $$", "died (SIGKILL)"),
        ("kill -6 $$", "died (SIGABRT)"),
        ("exit 3", "code 3"),
    ],
)
def test_the_end_of_a_silent_loader_is_reported(
    ending: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the signal or exit code of a loader that sends no message."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ending}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LoadError, match=re.escape(said)):
        loading.load(Request(1009, 0, (0, 0)))


def test_a_loader_killed_for_memory_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL and an increased oom_kill counter: the error has the memory needed."""
    vmstat, python = tmp_path / "vmstat", tmp_path / "python"
    vmstat.write_text("pgfault 7\noom_kill 2\n")
    python.write_text(f"#!/bin/sh\necho oom_kill 3 >{vmstat}\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(loading, "VMSTAT", vmstat)
    said = "^out of memory while compiling; the exporter requires about 101 MiB"
    with pytest.raises(LoadError, match=said):
        loading.load(Request(262144, 0, (0, 0)))


def test_a_loader_that_cannot_be_started_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one sentence, and no descriptor stays open."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    before = open_descriptors()
    with pytest.raises(LoadError, match="cannot be started: No such file"):
        loading.load(Request(1009, 0, (0, 0)))
    assert open_descriptors() == before


def test_an_abandoned_loader_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails for another reason leaves no process and no descriptor behind."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    before = open_descriptors()
    started = loading.Loading(Request(1009, 0, (0, 0)))
    child = started._child.pid
    assert Path(f"/proc/{child}").exists()
    started.close()
    assert not Path(f"/proc/{child}").exists()
    assert open_descriptors() == before
    started.close()  # again, as at the end of a successful start
