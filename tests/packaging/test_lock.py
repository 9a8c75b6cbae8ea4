# SPDX-License-Identifier: GPL-3.0-only
"""setup.sh installs the locked files, which satisfy the requirements in pyproject.toml."""

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
from packaging import tags
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
"""The requirements in pyproject.toml, by the name of their lock file."""

SHA256 = re.compile(r"[0-9a-f]{64}")


def locked(name: str) -> dict[str, Locked]:
    path = ROOT / "deploy" / "lock" / f"{name}.txt"
    return {each.name: each for each in read_lock(path)}


def test_each_extra_has_a_lock_file() -> None:
    """The exporter itself has one too."""
    assert [each.stem for each in LOCKS] == sorted(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_the_lock_satisfies_the_project(name: str) -> None:
    """Each required package is locked, in a version that is allowed."""
    there = locked("run") | locked(name)
    for asked in map(Requirement, ASKED[name]):
        assert there[canonicalize_name(asked.name)].version in asked.specifier


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """`make lowest` tests these versions, and each of them exists.

    The kind of fault: nobody has tested a lower bound.
    """
    there = {each.name: each for each in read_lock(LOWEST)}
    for asked in map(Requirement, [*ASKED["run"], *ASKED["test"]]):
        (bound,) = (each.version for each in asked.specifier if each.operator == ">=")
        assert Version(there[canonicalize_name(asked.name)].version) == Version(bound)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_locked_file_has_a_hash(path: Path) -> None:
    """Each package has one version, and no line says where to download it."""
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


def test_lock_files_agree() -> None:
    """A package in two lock files has one version, because both files are installed
    together."""
    seen: dict[str, Locked] = {}
    for path in LOCKS:
        for each in read_lock(path):
            before = seen.setdefault(each.name, each)
            assert (each.version, each.sha256) == (before.version, before.sha256)


PLATFORMS = ROOT / "deploy" / "platforms.sh"

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Debian's names of the architectures for which packages are built."""


def platforms(architecture: str) -> list[str]:
    """Return the platforms whose packages pip installs for an architecture."""
    listed = subprocess.check_output([PLATFORMS, architecture], text=True).split()
    return [each.removeprefix("--platform=") for each in listed]


def test_each_architecture_has_the_platforms_that_pip_chooses_there() -> None:
    """They are in the order in which pip prefers them.

    The kind of fault: the package for arm64 has older files than a package from arm64.
    """
    here = platforms(MACHINES[os.uname().machine])
    assert [each for each in tags.platform_tags() if each in here] == here
    amd64, arm64 = (platforms(each) for each in MACHINES.values())
    assert [each.replace("x86_64", "aarch64") for each in amd64] == arm64


def test_an_unknown_architecture_is_refused() -> None:
    """The message names those that are possible."""
    done = subprocess.run([PLATFORMS, "armhf"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "armhf: choose amd64 or arm64" in done.stderr


def make_wheel(directory: Path) -> Path:
    """Make the smallest wheel that pip accepts."""
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
    """setup.sh installs nothing, and does not record a complete installation."""
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
