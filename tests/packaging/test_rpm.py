# SPDX-License-Identifier: GPL-3.0-only
"""The package for Fedora has the right files, and can be installed and removed.

Fedora itself is not available here: Debian's rpm builds and installs the package.
"""

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.sbom import ROOT, read_lock
from tcpexporter.version import VERSION
from tests.packaging import test_deb
from tests.packaging.test_deb import DEFAULT, UNIT, VENV

PYTHON = (ROOT / "deploy/rpm/python-version").read_text().strip()
SITE = f"{VENV}/lib/python{PYTHON}/site-packages"
DOC = "usr/share/doc/tcpexporter"

ONLY_IN_DEBIAN = ("usr/share/doc/", "usr/share/lintian/", "usr/share/zsh/")

FILES = {
    *(each for each in test_deb.FILES if not each.startswith(ONLY_IN_DEBIAN)),
    *test_deb.DOCUMENTS,
    f"{DOC}/CHANGELOG.md",
    f"{DOC}/LICENSE",
    "usr/share/zsh/site-functions/_tcpexporter",
}
"""All files of the package outside of its virtual environment."""

SCRIPTLETS = ("POSTIN", "PREUN", "POSTUN", "POSTTRANS")


class Rpm(NamedTuple):
    """A package, and its files."""

    path: Path
    members: Mapping[str, tarfile.TarInfo]
    root: Path
    """A directory with the files."""

    def query(self, what: str) -> str:
        """Return what rpm says about the package, for example ``[%{REQUIRES}\\n]``."""
        return subprocess.check_output(
            ["rpm", "--query", "--package", "--queryformat", what, self.path], text=True
        )


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Rpm:
    if not shutil.which("rpmbuild"):
        pytest.skip("rpmbuild is not on PATH: Debian has it in the package rpm")
    directory = tmp_path_factory.mktemp("rpm")
    # Compressing as make rpm does would take half a minute.
    changed = {"PAYLOAD": "w1.zstdio", "SOURCE_DATE_EPOCH": "1700000000"}
    environment = {name: os.environ[name] for name in os.environ if name != "FOR_PYTHON"}
    subprocess.run(
        [ROOT / "deploy" / "rpm.sh", directory], env=environment | changed, check=True
    )
    (path,) = directory.iterdir()
    archive = directory / "files.tar"
    with archive.open("wb") as file, path.open("rb") as package:
        subprocess.run(
            ["rpm2archive", "--nocompression"], stdin=package, stdout=file, check=True
        )
    with tarfile.open(archive) as packed:
        members = {each.name.removeprefix("./"): each for each in packed.getmembers()}
    root = directory / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", root, "-xf", archive], check=True)
    return Rpm(path, members, root)


def test_the_package_has_these_files(rpm: Rpm) -> None:
    """Its virtual environment has modules for Fedora's Python alone."""
    files = {name for name, each in rpm.members.items() if not each.isdir()}
    assert {each for each in files if not each.startswith(f"{VENV}/")} == FILES
    assert f"{SITE}/tcpexporter/bpf/tcp_tracker.c" in files
    assert f"{SITE}/tcpexporter/revision.txt" in files
    assert not any("__pycache__" in each or "setuptools" in each for each in files)
    modules = re.findall(r"\.cpython-(\d+)-", "\n".join(files))
    assert {*modules} == {PYTHON.replace(".", "")}
    assert rpm.members[f"{VENV}/bin/python3"].linkname == "../../../bin/python3"


def test_root_owns_all_files(rpm: Rpm) -> None:
    """Every user can read them, and only the command can be executed."""
    for name, each in rpm.members.items():
        assert (each.uname, each.gname) == ("root", "root"), name
        if each.isfile():
            expected = 0o755 if name == "usr/bin/tcpexporter" else 0o644
            assert each.mode & 0o7777 == expected, name
        elif each.isdir():
            assert each.mode & 0o7777 == 0o755, name


def test_no_file_has_a_path_of_the_build(rpm: Rpm) -> None:
    """A host that installs the package has neither the tree nor the temporary files."""
    paths = [os.fsencode(ROOT), os.fsencode(rpm.root.parent), b"/tmp/tmp."]
    for name, each in rpm.members.items():
        if each.isfile() and not name.endswith(".so"):
            content = (rpm.root / name).read_bytes()
            assert not any(path in content for path in paths), name


def test_bundled_files_are_those_that_were_published(rpm: Rpm) -> None:
    """Each file has the hash in its package's list, and no other file is there."""
    test_deb.assert_published(rpm.root / SITE)


def test_the_package_requires_the_python_that_it_was_built_for(rpm: Rpm) -> None:
    """It also requires BCC and libseccomp, and nothing that it contains."""
    required = rpm.query(r"[%{REQUIRES} %{REQUIREFLAGS:depflags} %{REQUIREVERSION}\n]")
    lines = {" ".join(each.split()) for each in required.splitlines()}
    major, minor = map(int, PYTHON.split("."))
    assert {
        f"python(abi) = {PYTHON}",
        f"python3 >= {PYTHON}",
        f"python3 < {major}.{minor + 1}~",
        "python3-bcc",
        "libseccomp",
    } <= lines
    assert any(each.startswith("libc.so.6(GLIBC_") for each in lines)
    assert not any("python3dist" in each or "openblas" in each for each in lines)


def test_the_package_names_what_it_bundles(rpm: Rpm) -> None:
    """It provides none of that to other packages."""
    provided = rpm.query(r"[%{PROVIDES} %{PROVIDEVERSION}\n]").splitlines()
    bundled = {each for each in provided if each.startswith("bundled(")}
    assert bundled == {
        f"bundled(python3dist({each.name})) {each.version}"
        for each in read_lock(ROOT / "deploy/lock/run.txt")
        if each.name != "setuptools"
    }
    names = {each.split()[0] for each in provided} - {each.split()[0] for each in bundled}
    architecture = rpm.query("%{ARCH}").replace("_", "-")
    assert names == {
        "tcpexporter",
        f"tcpexporter({architecture})",
        "config(tcpexporter)",
    }


def test_the_package_for_a_newer_python_is_an_upgrade(rpm: Rpm) -> None:
    """The release names the version of Python."""
    release = f"1.py{PYTHON.replace('.', '')}"
    assert rpm.query("%{VERSION}-%{RELEASE}") == f"{VERSION}-{release}"


def test_the_unit_starts_the_command_of_the_package(rpm: Rpm) -> None:
    """The unit and the settings are those that the Debian package has."""
    assert "\nExecStart=/usr/bin/tcpexporter\n" in (rpm.root / UNIT).read_text()
    source = ROOT / "deploy/systemd/tcpexporter.default"
    assert (rpm.root / DEFAULT).read_text() == source.read_text()


def test_an_upgrade_keeps_changed_settings(rpm: Rpm) -> None:
    """The settings are the only configuration file: c is %config, and n is noreplace."""
    flags = rpm.query(r"[%{FILENAMES} %{FILEFLAGS:fflags}\n]").splitlines()
    marked = dict(each.split() for each in flags if len(each.split()) > 1)
    kept = {name: each for name, each in marked.items() if "c" in each or "n" in each}
    assert kept == {f"/{DEFAULT}": "cn"}


def test_the_scriptlets_are_valid(rpm: Rpm) -> None:
    """A shell can parse them, and no macro is left in them."""
    for name in SCRIPTLETS:
        script = rpm.query(f"%{{{name}}}")
        assert "tcpexporter" in script
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)
        assert not re.search(r"(?m)^%|@[A-Z_]+@", script)


def test_rpmlint_reports_no_error(rpm: Rpm) -> None:
    """deploy/rpm/rpmlint.toml has the reason for each report that is left out."""
    if not shutil.which("rpmlint"):
        pytest.skip("rpmlint is not on PATH: Debian has it in the package rpmlint")
    done = subprocess.run(
        ["rpmlint", "--config", ROOT / "deploy/rpm/rpmlint.toml", rpm.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 errors" in done.stdout


HELPER = """\
#!/bin/sh
echo "$*" >>/log
"""
"""Instead of systemd's program for scriptlets: logs its arguments."""

COMPILER = """\
#!/bin/sh
echo "${0##*/} $*" >>/log
mkdir "$4/__pycache__"
"""
"""Instead of Python: logs its arguments and leaves a directory of compiled modules."""


def make_root(root: Path) -> None:
    """Make the smallest system that the scriptlets can run in."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    (root / "bin").mkdir(parents=True)
    shutil.copy(busybox, root / "bin")
    for name in ("sh", "find", "rm", "mkdir"):
        (root / "bin" / name).symlink_to("busybox")
    for path, text in {
        "usr/lib/systemd/systemd-update-helper": HELPER,
        "usr/bin/python3": COMPILER,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        (root / path).chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="installing a package requires root")
def test_the_package_can_be_installed_and_removed(rpm: Rpm, tmp_path: Path) -> None:
    """The scriptlets enable, compile, restart and stop; a removal leaves no file."""
    root = tmp_path / "root"
    make_root(root)

    def run(*arguments: str | Path) -> list[str]:
        """Run rpm in the root directory; return what the scriptlets have logged."""
        (root / "log").write_text("")
        options = [f"--root={root}", "--dbpath=/rpmdb", "--nodeps"]
        subprocess.run(["rpm", *options, *arguments], check=True)
        return (root / "log").read_text().splitlines()

    def files() -> set[Path]:
        return {
            each
            for each in root.rglob("*")
            if (each.is_symlink() or each.is_file() or "tcpexporter" in each.name)
            and root / "rpmdb" not in each.parents
            and each != root / "log"
        }

    before = files()
    compiled = f"python3 -m compileall -q /{VENV}/lib"
    assert run("--install", rpm.path) == [
        "install-system-units tcpexporter.service",
        compiled,
    ]
    assert root / VENV / "lib/__pycache__" in [*root.rglob("__pycache__")]
    run("--verify", "tcpexporter")
    assert run("--erase", "tcpexporter") == ["remove-system-units tcpexporter.service"]
    assert files() == before
