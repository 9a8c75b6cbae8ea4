# SPDX-License-Identifier: GPL-3.0-only
"""The Debian packages have the right files, and can be installed, used and removed."""

import base64
import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from deploy.documents import NOT_OF_A_SERVICE
from deploy.sbom import ROOT
from tcpexporter.config.settings import SETTINGS, parse
from tcpexporter.version import VERSION

VENV = "usr/lib/tcpexporter"
MODULES = "usr/lib/python3/dist-packages"
OVERRIDES = "usr/share/lintian/overrides/tcpexporter"
DEFAULT = "etc/default/tcpexporter"
UNIT = "usr/lib/systemd/system/tcpexporter.service"

DOCUMENTS = {
    f"usr/share/doc/tcpexporter/{each.relative_to(ROOT)}"
    for each in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}

FILES = {
    *DOCUMENTS,
    DEFAULT,
    UNIT,
    "usr/bin/tcpexporter",
    "usr/share/bash-completion/completions/tcpexporter",
    "usr/share/doc/tcpexporter/changelog.Debian.gz",
    "usr/share/doc/tcpexporter/changelog.gz",
    "usr/share/doc/tcpexporter/copyright",
    "usr/share/fish/vendor_completions.d/tcpexporter.fish",
    OVERRIDES,
    "usr/share/man/man8/tcpexporter.8.gz",
    "usr/share/tcpexporter/prometheus/examples.rules.yml",
    "usr/share/tcpexporter/prometheus/recording.rules.yml",
    "usr/share/tcpexporter/prometheus/tcpexporter.rules.yml",
    "usr/share/zsh/vendor-completions/_tcpexporter",
    *(
        f"usr/share/tcpexporter/grafana/{each.name}"
        for each in ROOT.glob("deploy/grafana/*.json")
    ),
}
"""All files of the package outside of its virtual environment."""

WITH_MODULES = "debian13"
"""The release whose package has no virtual environment; it can be built on each release."""

PACKAGES = {
    "bcrypt": "python3-bcrypt",
    "h11": "python3-h11",
    "numpy": "python3-numpy",
    "prometheus-client": "python3-prometheus-client",
    "pyroute2": "python3-pyroute2",
    "pyseccomp": "python3-seccomp",
    "python-json-logger": "python3-pythonjsonlogger",
    "pyyaml": "python3-yaml",
}
"""Debian's packages of the Python packages that the exporter requires."""


class Deb(NamedTuple):
    """A package, and its files."""

    path: Path
    members: Mapping[str, tarfile.TarInfo]
    root: Path
    """A directory with the files, and the control files in DEBIAN."""

    def text(self, name: str) -> str:
        return (self.root / name).read_text()


def build(directory: Path, release: str) -> Path:
    """Build the package for a release of Debian."""
    if not shutil.which("dpkg-shlibdeps"):
        pytest.skip("dpkg-shlibdeps is not on PATH: Debian has it in the package dpkg-dev")
    # Compressing as make deb does would take half a minute.
    fast = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
    environ = {"SOURCE_DATE_EPOCH": "1700000000", "FOR_RELEASE": release}
    subprocess.run(
        [ROOT / "deploy" / "deb.sh", directory], env=os.environ | fast | environ, check=True
    )
    (path,) = directory.iterdir()
    return path


def unpack(path: Path) -> Deb:
    directory = path.parent
    archive = directory / "files.tar"
    with archive.open("wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=file, check=True)
    with tarfile.open(archive) as packed:
        members = {each.name.removeprefix("./"): each for each in packed.getmembers()}
    subprocess.run(["dpkg-deb", "--raw-extract", path, directory / "root"], check=True)
    return Deb(path, members, directory / "root")


def this_release() -> str:
    release = platform.freedesktop_os_release()
    return f"{release['ID']}{release.get('VERSION_ID', '')}"


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Deb:
    """Return the package with a virtual environment for this release."""
    if this_release() == WITH_MODULES:
        pytest.skip("the package of this release has no virtual environment")
    return unpack(build(tmp_path_factory.mktemp("deb"), this_release()))


@pytest.fixture(scope="module")
def with_modules(tmp_path_factory: pytest.TempPathFactory) -> Deb:
    """Return the package that requires Debian's Python packages."""
    return unpack(build(tmp_path_factory.mktemp("with-modules"), WITH_MODULES))


@pytest.fixture(scope="module", params=["deb", "with_modules"])
def either(request: pytest.FixtureRequest) -> Deb:
    package: Deb = request.getfixturevalue(request.param)
    return package


def fields_of(package: Deb) -> dict[str, str]:
    """Return the fields of the control file that have one line."""
    shown = subprocess.check_output(["dpkg-deb", "--field", package.path], text=True)
    assert "@" not in shown.replace("@example.org", "")
    return dict(re.findall(r"(?m)^([A-Z][\w-]*): (.*)$", shown))


def test_the_package_has_these_files(deb: Deb) -> None:
    """Outside of its virtual environment there is nothing else."""
    files = {name for name, each in deb.members.items() if not each.isdir()}
    assert {each for each in files if not each.startswith(f"{VENV}/")} == FILES
    assert f"{VENV}/bin/python3" in files
    site = f"{VENV}/lib/python3.{sys.version_info.minor}/site-packages"
    assert f"{site}/tcpexporter/bpf/tcp_tracker.c" in files
    assert f"{site}/tcpexporter/revision.txt" in files
    assert not any("__pycache__" in each or "setuptools" in each for each in files)


def test_the_package_of_debian_13_has_these_files(with_modules: Deb) -> None:
    """Outside of Python's directory they are the same, without overrides.

    pip does not uninstall the exporter: it has no list of its files.
    """
    files = {name for name, each in with_modules.members.items() if not each.isdir()}
    ours = (f"{MODULES}/tcpexporter/", f"{MODULES}/tcpexporter-{VERSION}.dist-info/")
    assert {each for each in files if not each.startswith(ours)} == FILES - {OVERRIDES}
    assert f"{ours[0]}bpf/tcp_tracker.c" in files
    assert f"{ours[0]}revision.txt" in files
    assert with_modules.text(f"{ours[1]}INSTALLER") == "debian\n"
    assert not any("__pycache__" in each or each.endswith("RECORD") for each in files)
    assert with_modules.text("usr/bin/tcpexporter").startswith("#!/usr/bin/python3 -I\n")
    assert "virtual environment" not in with_modules.text("DEBIAN/control")


def test_the_package_of_debian_13_is_reproducible(
    with_modules: Deb, tmp_path: Path
) -> None:
    """A second build gives the same bytes, and the name has the release."""
    again = build(tmp_path, WITH_MODULES)
    assert again.name == f"tcpexporter_{VERSION}-1~debian13_all.deb"
    assert again.read_bytes() == with_modules.path.read_bytes()


def test_the_package_of_debian_13_requires_what_the_project_does(
    with_modules: Deb,
) -> None:
    """Each of the project's requirements has a package with the same lowest version.

    A version before the colon is Debian's epoch.
    """
    depends = fields_of(with_modules)["Depends"]
    assert depends.startswith("python3 (>= 3.11), ")
    versions = dict(re.findall(r"(\S+?)(?: \(>= (?:\d+:)?([^-)]+).*?\))?(?:, |$)", depends))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*map(Requirement, project["dependencies"])]
    assert {each.name for each in required} == {*PACKAGES}
    assert {*versions} == {"python3", "python3-bpfcc", *PACKAGES.values()}
    for each in required:
        (lowest,) = (part.version for part in each.specifier if part.operator == ">=")
        if each.name != "pyseccomp":  # Debian has another module, with other versions
            assert Version(versions[PACKAGES[each.name]]) == Version(lowest)


def test_a_virtual_environment_requires_its_own_release(tmp_path: Path) -> None:
    """The message says where to build the package."""
    done = subprocess.run(
        [ROOT / "deploy" / "deb.sh", tmp_path],
        env=os.environ | {"FOR_RELEASE": "debian11"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "build a package for debian11 on debian11" in done.stderr
    assert not list(tmp_path.iterdir())


def test_root_owns_all_files(either: Deb) -> None:
    """Every user can read them, and only the command can be executed."""
    for name, each in either.members.items():
        assert (each.uname, each.gname, each.uid, each.gid) == ("root", "root", 0, 0), name
        if each.isfile():
            assert each.mode == (0o755 if name == "usr/bin/tcpexporter" else 0o644), name
        elif each.isdir():
            assert each.mode == 0o755, name


def test_no_file_has_a_path_of_the_build(either: Deb) -> None:
    """The tree and the temporary directories are not on the host of the package."""
    paths = [os.fsencode(ROOT), os.fsencode(either.root.parent), b"/tmp/tmp."]
    for name, each in either.members.items():
        if each.isfile() and not name.endswith(".so"):
            content = (either.root / name).read_bytes()
            assert not any(path in content for path in paths), name


def test_the_package_requires_the_python_that_it_was_built_for(deb: Deb) -> None:
    """The virtual environment has the modules of one version of Python."""
    fields = fields_of(deb)
    assert fields["Version"].startswith(f"{VERSION}-1~")
    depends = fields["Depends"].split(", ")
    minor = sys.version_info.minor
    assert {f"python3 (>= 3.{minor})", f"python3 (<< 3.{minor + 1})"} <= {*depends}
    assert {"python3-bpfcc", "libseccomp2"} <= {*depends}
    assert any(each.startswith("libc6 (>= ") for each in depends)


def test_the_unit_starts_the_command_of_the_package(either: Deb) -> None:
    """Its other lines are those of the unit in the tree, with a bound of memory and the
    manual."""
    unit = either.text(UNIT).splitlines()
    source = (ROOT / "deploy/systemd/tcpexporter.service").read_text().splitlines()
    changed = [new for old, new in zip(source, unit, strict=True) if old != new]
    assert changed == ["ExecStart=/usr/bin/tcpexporter"]
    assert "MemoryMax=1G" in unit
    assert "Documentation=man:tcpexporter(8)" in unit


def test_the_default_file_has_every_setting_of_a_service(either: Deb) -> None:
    """All are commented out; without the # they are the defaults."""
    lines = either.text(DEFAULT).splitlines()
    assert all(line.startswith("#") for line in lines if line)
    given = dict(re.findall(r"(?m)^#(TCPEXPORTER_\w+)=(.*)$", "\n".join(lines)))
    left_out = {each for each in SETTINGS if each.name in NOT_OF_A_SERVICE}
    assert len(left_out) == len(NOT_OF_A_SERVICE)
    assert list(given) == [each.variables[0] for each in SETTINGS if each not in left_out]
    assert parse([], given) == parse([], {})
    assert either.text("DEBIAN/conffiles").split() == [f"/{DEFAULT}"]


def assert_published(site: Path) -> None:
    """Assert that a directory has the files of its packages' lists, and no others."""
    listed = set()
    for record in site.glob("*.dist-info/RECORD"):
        for name, digest, _ in csv.reader(record.read_text().splitlines()):
            content = (site / name).read_bytes()
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            assert digest in ("", f"sha256={expected.decode().rstrip('=')}"), name
            listed.add(name)
    assert listed == {
        str(each.relative_to(site)) for each in site.rglob("*") if each.is_file()
    }


def test_bundled_files_are_those_that_were_published(deb: Deb) -> None:
    """Each file has the hash in its package's list, and no other file is there."""
    (site,) = deb.root.glob(f"{VENV}/lib/*/site-packages")
    assert_published(site)


def test_every_bundled_package_is_in_the_copyright_file(deb: Deb) -> None:
    """The texts of the licences that it names are in the package."""
    text = deb.text("usr/share/doc/tcpexporter/copyright")
    infos = deb.root.glob(f"{VENV}/lib/*/site-packages/*.dist-info/METADATA")
    names = {re.findall("(?m)^Name: (.*)$", each.read_text())[0] for each in infos}
    assert names == {*re.findall("(?m)^Name: (.*)$", text)} | {"tcpexporter"}
    for entry in text.split("\n\n"):
        if entry.startswith("Name: "):
            texts = re.findall("(?m)^ /(.*)$", entry)
            assert texts
            assert all((deb.root / each).exists() for each in texts)


def test_lintian_reports_no_error(either: Deb) -> None:
    """Overrides have their reason in deploy/deb/overrides."""
    if not shutil.which("lintian"):
        pytest.skip("lintian is not on PATH: Debian has it in the package lintian")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error", either.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_maintainer_scripts_are_valid(either: Deb) -> None:
    """They can be executed, and a shell can parse them."""
    for name in ("postinst", "prerm", "postrm"):
        script = either.root / "DEBIAN" / name
        assert os.access(script, os.X_OK)
        subprocess.run(["sh", "-n", script], check=True)


INSTALL = """
mount -t tmpfs new "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" root "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
cp "$2" "$1/root/tcpexporter.deb"
chroot "$1/root" apt-get install -y /tcpexporter.deb >&2
chroot "$1/root" /usr/bin/tcpexporter --version
chroot "$1/root" sh -c 'ls /etc/systemd/system/multi-user.target.wants'
chroot "$1/root" sh -c 'find /usr/lib/tcpexporter -name "*.pyc" | wc -l'
mkdir "$1/root/var/lib/tcpexporter"
chroot "$1/root" apt-get remove -y tcpexporter >&2
test ! -e "$1/root/usr/lib/tcpexporter"
test ! -e "$1/root/usr/bin/tcpexporter"
chroot "$1/root" test -e /etc/default/tcpexporter
chroot "$1/root" apt-get purge -y tcpexporter >&2
rm "$1/root/tcpexporter.deb"
# In an overlay, a character device marks a file that was deleted.
test -z "$(find "$1/upper" -name '*tcpexporter*' ! -type c)"
"""
"""Installs and removes a package on a copy of this machine, which is discarded."""


@pytest.mark.skipif(os.geteuid() != 0, reason="installing a package requires root")
def test_the_package_can_be_installed_and_removed(deb: Deb, tmp_path: Path) -> None:
    """apt finds its dependencies, the command runs, and a purge leaves nothing."""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-eux", "-c", INSTALL, "sh", tmp_path, deb.path],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, *wants, compiled = done.stdout.splitlines()
    assert VERSION in version
    assert "tcpexporter.service" in wants
    assert int(compiled) > 300
