# SPDX-License-Identifier: GPL-3.0-only
"""The directory of --pin: what is said of one that cannot be used."""

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tcpexporter.ebpf import pin_directory
from tcpexporter.errors import PinError


@pytest.mark.parametrize(
    ("mounted", "remedy"),
    [
        (True, "choose a directory below /sys/fs/bpf"),
        (False, "to mount one: mount -t bpf bpf /sys/fs/bpf"),
    ],
)
def test_a_warning_names_the_directory_and_what_helps_on_this_host(
    mounted: bool,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The BPF file system is not to be mounted a second time. A relative path is not
    shortened to its parent, the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pin_directory,
        "is_bpf_file_system",
        lambda path: mounted and path == pin_directory.BPF_FS,
    )
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    uses: tuple[Callable[[Path], object], ...]
    uses = (pin_directory.open_locked, pin_directory.check)
    for at, directory in itertools.product((0, 1), (tmp_path / "pin", Path("relative"))):
        caplog.clear()
        assert not uses[at](directory)
        assert caplog.messages == [
            f"nothing is pinned: {directory} is not in a BPF file system; {remedy}"
        ]
    assert not list(tmp_path.iterdir())


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    """Only the directory itself is created, not its parents."""
    with pytest.raises(PinError, match=f"No such file or directory: create {tmp_path}/a,"):
        pin_directory.open_locked(tmp_path / "a" / "b")


def test_a_path_that_may_not_be_looked_up_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not count as missing: then --unpin would say that nothing is pinned."""

    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(PinError, match="Permission denied: start as root, or choose"):
        pin_directory.exists(Path("/sys/fs/bpf/tcpexporter"))


@pytest.mark.parametrize("use", [pin_directory.open_locked, pin_directory.check])
def test_a_check_refuses_a_path_that_the_start_would_refuse(
    use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symbolic link, even to a usable directory, and a file."""
    monkeypatch.setattr(pin_directory, "is_bpf_file_system", lambda _: True)
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    link, dangling, file = (tmp_path / name for name in ("link", "dangling", "file"))
    link.symlink_to(own)
    dangling.symlink_to(tmp_path / "absent")
    file.touch(0o600)
    for path in (link, dangling, file):
        with pytest.raises(PinError, match=f"^{path} cannot be used: "):
            use(path)
    assert not (tmp_path / "absent").exists()


def test_a_check_accepts_a_usable_directory_and_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing directory is not created, and no descriptor stays open."""
    monkeypatch.setattr(pin_directory, "is_bpf_file_system", lambda _: True)
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert pin_directory.check(own)
    assert pin_directory.check(tmp_path / "absent")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not (tmp_path / "absent").exists()
    own.chmod(0o755)
    with pytest.raises(PinError, match="is accessible to other users"):
        pin_directory.check(own)
