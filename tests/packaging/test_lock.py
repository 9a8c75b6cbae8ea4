# SPDX-License-Identifier: GPL-3.0-only
"""setup.sh installs what is locked, and that is what pyproject.toml asks for."""

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.sbom import ROOT, Locked, read_lock

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

LOWEST = ROOT / "deploy" / "lock" / "lowest.txt"

FILES = sorted((ROOT / "deploy" / "lock").iterdir())
LOCKS = [path for path in FILES if path != LOWEST]

ASKED: Mapping[str, list[str]] = {
    "run": [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]],
    **PROJECT["project"]["optional-dependencies"],
}
"""By the name of the lock, what pyproject.toml has."""

SHA256 = re.compile(r"[0-9a-f]{64}")


def locked(name: str) -> dict[str, Locked]:
    path = ROOT / "deploy" / "lock" / f"{name}.txt"
    return {each.name: each for each in read_lock(path)}


def test_there_is_a_lock_for_each_extra() -> None:
    """And one for the exporter itself."""
    assert [each.stem for each in LOCKS] == sorted(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_the_lock_satisfies_the_project(name: str) -> None:
    """Whatever is asked for is there, in a version that is allowed."""
    there = locked("run") | locked(name)
    for asked in map(Requirement, ASKED[name]):
        assert there[canonicalize_name(asked.name)].version in asked.specifier


def test_the_lowest_versions_are_those_of_the_project() -> None:
    """So `make lowest` tests the bounds, and each bound is a version that exists.

    The kind of fault: a lower bound that nobody has tried.
    """
    there = {each.name: each for each in read_lock(LOWEST)}
    for asked in map(Requirement, [*ASKED["run"], *ASKED["test"]]):
        (bound,) = (each.version for each in asked.specifier if each.operator == ">=")
        assert Version(there[canonicalize_name(asked.name)].version) == Version(bound)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_its_hash(path: Path) -> None:
    """One version of each package, and nothing that says where to get it."""
    entries = list(read_lock(path))
    assert len({each.name for each in entries}) == len(entries) > 0
    for each in entries:
        assert str(each.requirement.specifier) == f"=={each.version}"
        assert each.requirement.url is None
        assert each.sha256
        assert all(map(SHA256.fullmatch, each.sha256))
    options = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", path.read_text()))
    assert options == {"--hash"}
    assert "://" not in path.read_text()


def test_locks_are_of_one_mind() -> None:
    """What is in two of them is the same in both, as they are installed together."""
    seen: dict[str, Locked] = {}
    for path in LOCKS:
        for each in read_lock(path):
            before = seen.setdefault(each.name, each)
            assert (each.version, each.sha256) == (before.version, before.sha256)


def make_wheel(directory: Path) -> Path:
    """As little as pip takes for one."""
    path = directory / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            "tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n"
        )
        wheel.writestr(
            "tiny-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return path


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """setup.sh installs nothing, and does not take itself for done."""
    wheel = make_wheel(tmp_path)
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with wheel.open("ab") as file:
        file.write(b"\0")
    lock = tmp_path / "tree" / "deploy" / "lock"
    lock.mkdir(parents=True)
    (lock / "run.txt").write_text(f"tiny==1 \\\n    --hash=sha256:{right}\n")
    shutil.copy(ROOT / "deploy" / "setup.sh", lock.parent)
    shutil.copy(ROOT / "pyproject.toml", lock.parent.parent)
    done = subprocess.run(
        [lock.parent / "setup.sh", "run"],
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert right in done.stderr
    venv = tmp_path / "tree" / ".venv"
    assert not list(venv.glob("lib/*/site-packages/tiny*"))
    assert not (venv / "installed").exists()
