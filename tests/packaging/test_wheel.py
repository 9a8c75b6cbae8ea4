# SPDX-License-Identifier: GPL-3.0-only
"""The wheel has the right files, and is reproducible."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploy.sbom import ROOT
from tcpexporter.version import VERSION
from tests.vm.images import pack_tree

EPOCH_S = 1_700_000_000


def copy_tree(into: Path, *, mode: int, age_s: int, backwards: bool) -> None:
    """Copy the tree to a repository; file modes, times and order depend on the
    arguments."""
    archive = into.with_suffix(".tar")
    pack_tree(archive)
    with tarfile.open(archive) as packed:
        names = sorted(packed.getnames(), reverse=backwards)
        for name in names:
            content, path = packed.extractfile(name), into / name
            assert content
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            path.chmod(mode | packed.getmember(name).mode & 0o100)
            os.utime(path, (EPOCH_S - age_s,) * 2)
    subprocess.run(["git", "init", "-q"], cwd=into, check=True)
    subprocess.run(["git", "add", "--all"], cwd=into, check=True)
    dates = {f"GIT_{who}_DATE": f"{EPOCH_S} +0000" for who in ("AUTHOR", "COMMITTER")}
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "gc.auto=0")
    subprocess.run(
        ["git", *who, "commit", "-q", "-m", "x"],
        cwd=into,
        env=os.environ | dates,
        check=True,
    )


def build(tree: Path, umask: int, **environment: str) -> Path:
    subprocess.run(
        [tree / "deploy" / "wheel.sh"],
        env=os.environ
        | {"PYTHON": sys.executable, "SOURCE_DATE_EPOCH": str(EPOCH_S)}
        | environment,
        umask=umask,
        check=True,
    )
    (wheel,) = (tree / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("trees")
    one, other = directory / "one", directory / "another" / "place"
    other.parent.mkdir()
    copy_tree(one, mode=0o644, age_s=0, backwards=False)
    copy_tree(other, mode=0o600, age_s=7777, backwards=True)
    return one, other


@pytest.fixture(scope="module")
def wheel(trees: tuple[Path, Path]) -> Path:
    return build(trees[0], 0o022, TZ="UTC", LC_ALL="C")


def test_two_builds_have_the_same_bytes(trees: tuple[Path, Path], wheel: Path) -> None:
    """Directory, umask, time, time zone, locale and order of files differ."""
    other = build(trees[1], 0o077, TZ="Asia/Kolkata", LC_ALL="C.UTF-8", PYTHONHASHSEED="7")
    assert other.name == wheel.name == f"tcpexporter-{VERSION}-py3-none-any.whl"
    first, second = (hashlib.sha256(each.read_bytes()).digest() for each in (wheel, other))
    assert first == second


def test_the_wheel_has_the_program_and_no_tests(wheel: Path) -> None:
    """It has the package, the C program with its headers, and the licence only."""
    expected = {
        "tcpexporter/py.typed",
        "tcpexporter/revision.txt",
        *(str(each.relative_to(ROOT)) for each in ROOT.glob("tcpexporter/**/*.py")),
        *(str(each.relative_to(ROOT)) for each in ROOT.glob("tcpexporter/web/static/*")),
        *(f"tcpexporter/{each.relative_to(ROOT)}" for each in ROOT.glob("bpf/**/*.[ch]")),
        *(f"tcpexporter/{each.relative_to(ROOT)}" for each in ROOT.glob("bpf/*.py")),
    }
    dist_info = f"tcpexporter-{VERSION}.dist-info"
    for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"):
        expected.add(f"{dist_info}/{name}")
    expected.add(f"{dist_info}/licenses/LICENSE")
    with zipfile.ZipFile(wheel) as packed:
        assert set(packed.namelist()) == expected
        assert all(each.external_attr >> 16 & 0o444 == 0o444 for each in packed.infolist())


def test_the_wheel_contains_its_commit(trees: tuple[Path, Path], wheel: Path) -> None:
    """The exporter reads the commit from a file, and does not run git."""
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=trees[0])
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read("tcpexporter/revision.txt") == head


def test_the_wheel_requires_the_packages_of_the_project(wheel: Path) -> None:
    """BCC is not required, because the package index has another project of that name."""
    with zipfile.ZipFile(wheel) as packed:
        metadata = packed.read(f"tcpexporter-{VERSION}.dist-info/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert any("numpy" in line for line in needed)
    assert not any(line.startswith("Requires-Dist: bcc") for line in needed)
