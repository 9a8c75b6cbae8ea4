# SPDX-License-Identifier: GPL-3.0-only
"""Writing a file atomically, with real files and the real child process.

The kind of fault: a reader of the file sees a part of an exposition, or the old file
disappears.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tcpexporter.errors import ServerError
from tcpexporter.metrics.output import Output
from tests.support import eventually

PAGE = b"tcpexporter_duration_seconds 7.0\n" * 1009


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  only the names


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_page_replaces_the_file_when_it_is_published(
    tmp_path: Path, old: bytes | None
) -> None:
    """Until then the file is unchanged; afterwards every user can read it, with any
    umask."""
    path = tmp_path / "x.prom"
    if old:
        path.write_bytes(old)
        path.chmod(0o600)
    before = open_descriptors()
    umask = os.umask(0o777)
    try:
        output = Output(str(path))
    finally:
        os.umask(umask)
    assert (path.read_bytes() if path.exists() else None) == old
    assert not [
        name for name in names(tmp_path) if name.endswith(".prom") and name != path.name
    ]
    output.publish(PAGE)
    assert path.read_bytes() == PAGE
    assert path.stat().st_mode & 0o7777 == 0o644
    output.close()
    assert names(tmp_path) == ["x.prom"]
    assert open_descriptors() == before


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is relative to the working directory at the time of opening."""
    monkeypatch.chdir(tmp_path)
    output = Output("x.prom")
    monkeypatch.chdir("/")
    output.publish(PAGE)
    assert (tmp_path / "x.prom").read_bytes() == PAGE


def test_closing_without_a_page_leaves_the_old_file(tmp_path: Path) -> None:
    """This happens when collecting fails."""
    path = tmp_path / "x.prom"
    path.write_bytes(b"old")
    Output(str(path)).close()
    assert names(tmp_path) == ["x.prom"]
    assert path.read_bytes() == b"old"


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    """After SIGKILL in the middle of a write, the child process removes the new file."""
    path = tmp_path / "x.prom"
    path.write_bytes(b"old")
    program = (
        "import os, sys\n"
        "from tcpexporter.metrics.output import Output\n"
        "output = Output(sys.argv[1])\n"
        "os.write(output._file, b'half a page')\n"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    eventually(lambda: names(tmp_path) == ["x.prom"])
    assert path.read_bytes() == b"old"


def test_a_page_that_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes write(2) fail like a full disk."""
    path = tmp_path / "x.prom"
    path.write_bytes(b"old")
    output = Output(str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4099, hard))
    try:
        with pytest.raises(ServerError, match=r"cannot write .*x\.prom: File too large"):
            output.publish(PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    output.close()
    assert names(tmp_path) == ["x.prom"]
    assert path.read_bytes() == b"old"


def test_a_rename_that_fails_is_reported(tmp_path: Path) -> None:
    """The child process reports the error and removes the new file."""
    path = tmp_path / "x.prom"
    output = Output(str(path))
    path.mkdir()
    with pytest.raises(ServerError, match=r"cannot write .*x\.prom: Is a directory"):
        output.publish(PAGE)
    assert names(tmp_path) == ["x.prom"]


def test_a_child_process_that_is_killed_is_reported(tmp_path: Path) -> None:
    """The page was not renamed to the path, so `publish` raises an error."""
    output = Output(str(tmp_path / "x.prom"))
    os.kill(output._child, signal.SIGKILL)
    with pytest.raises(ServerError, match=r"died \(SIGKILL\)|Broken pipe"):
        output.publish(PAGE)
    output.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent/x.prom", "absent does not exist: create it, or choose another path with"),
        ("file/x.prom", "Not a directory"),
        ("directory", "not a regular file"),
        ("directory/", "not a regular file"),
        ("link", "not a regular file"),
        ("/dev/null", "not a regular file"),
        ("/dev/stdout", "not a regular file"),
        ("..", "not a regular file"),
        ("/", "not a regular file"),
        ("x" * 250, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_replaced_is_refused_at_once(
    name: str, reason: str, tmp_path: Path
) -> None:
    """It is refused at opening; a device or a symbolic link is never replaced."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    there, descriptors = names(tmp_path), open_descriptors()
    with pytest.raises(ServerError, match=reason):
        Output(str(tmp_path / name) if name != "directory/" else f"{tmp_path}/directory/")
    assert names(tmp_path) == there
    assert open_descriptors() == descriptors
