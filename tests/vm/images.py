# SPDX-License-Identifier: GPL-3.0-only
"""Builds root file systems of Debian's releases, without a kernel, for the tests."""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.vm import CACHE, ROOT, VmError, foreign
from tests.vm.apt import source
from tests.vm.architectures import AMD64, ARM64, Architecture

SIZE = "2G"
"""Maximum size of an image; its file is sparse."""

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # Packages are copied as wheels, because a chroot cannot reach the package index.
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "/wheels",
}


@dataclass(frozen=True)
class Userland:
    """The root file system of a guest, without its kernel."""

    name: str
    suite: str
    """The release of Debian."""
    python: str
    packages: tuple[str, ...] = ("kmod", "python3")
    """Packages of an installed machine that the variant minbase does not have."""
    command: str = "deploy/setup.sh guest"
    """Command that installs the rest, in /tcpexporter."""
    architecture: Architecture = AMD64


BOOKWORM = Userland("Debian 12", "bookworm", "3.11")
TRIXIE = Userland("Debian 13", "trixie", "3.13")
"""Has BCC, its dependencies, Python packages and iproute2; no compiler and no headers."""

BOOKWORM_ARM64 = replace(BOOKWORM, architecture=ARM64)
TRIXIE_ARM64 = replace(TRIXIE, architecture=ARM64)

SYSTEMD = ("kmod", "python3", "systemd-sysv", "udev", "dbus", "libpam-systemd")

VAGRANT = Userland(
    "Debian 12, vagrant/",
    "bookworm",
    "3.11",
    SYSTEMD,
    "vagrant/provision.sh; deploy/setup.sh guest",
)
"""A machine with systemd and services, as in ``vagrant/``."""

TRIXIE_SYSTEMD = replace(
    TRIXIE,
    name="Debian 13, systemd",
    packages=(
        *SYSTEMD,
        # What the package of Debian 13 requires, except BCC.
        *("python3-bcrypt", "python3-h11", "python3-numpy", "python3-prometheus-client"),
        *("python3-pyroute2", "python3-pythonjsonlogger", "python3-seccomp"),
        "python3-yaml",
    ),
)
"""A machine with systemd and the packages that the exporter's package requires."""

LOCKS = ("run.txt", "test.txt")
"""Lock files that `deploy/setup.sh guest` installs."""

INPUTS = (
    Path(__file__),
    Path(foreign.__file__),
    ROOT / "pyproject.toml",
    *sorted(
        path
        for path in (ROOT / "deploy").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ),
    *sorted((ROOT / "vagrant").iterdir()),
)
"""Files that an image depends on: if one of them changes, the image is built again."""


def build(userland: Userland) -> Path:
    """Return the image; build it unless it is in the cache and its inputs are unchanged.

    Raises:
        VmError: it cannot be built; the message has the reason.
    """
    name = f"{slug(userland.name)}-{userland.architecture.name}-"
    image = CACHE / "images" / f"{name}{_fingerprint(userland)}.img"
    if image.exists():
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    for old in image.parent.glob(f"{name}{'?' * 16}.img"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        _pip(userland, "download", f"--dest={directory / 'wheels'}")
        if userland.architecture.is_native:
            _install(userland, directory)
        else:
            _unpack(userland, directory)
        new = directory / image.name
        _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d",
             directory / "root", new, SIZE)  # fmt: skip
        new.rename(image)
    return image


def slug(name: str) -> str:
    """Return a userland's name for file names."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


def _fingerprint(userland: Userland) -> str:
    inputs = hashlib.sha256(repr(userland).encode())
    for each in INPUTS:
        inputs.update(each.read_bytes())
    return inputs.hexdigest()[:16]


def pack_tree(archive: Path) -> None:
    """Pack all files that git tracks or would add, in their present state."""
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        text=True,
    )
    with tarfile.open(archive, "w") as packed:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                packed.add(ROOT / name, name, recursive=False)


def _pip(userland: Userland, command: str, *options: str) -> None:
    """Run a command of pip for the packages of `LOCKS`, and for the userland's Python."""
    platforms = subprocess.check_output(
        [ROOT / "deploy/platforms.sh", userland.architecture.name], text=True
    ).split()
    _run(
        sys.executable, "-m", "pip", command, "-q", "--only-binary=:all:",
        f"--python-version={userland.python}", "--require-hashes",
        *platforms,
        *(f"--requirement={ROOT / 'deploy/lock' / name}" for name in LOCKS),
        *options,
    )  # fmt: skip


def _install(userland: Userland, directory: Path) -> None:
    """Install the release, and run `Userland.command` in it."""
    pack_tree(directory / "tree.tar")
    hooks = [
        'mkdir "$1/tcpexporter"',
        f'tar -C "$1/tcpexporter" -xf {directory / "tree.tar"}',
        f'cp -r {directory / "wheels"} "$1/wheels"',
        f'chroot "$1" sh -ec "cd /tcpexporter; {userland.command}"',
        'rm -r "$1/wheels"',
    ]
    _debootstrap(
        userland,
        directory / "root",
        "--variant=minbase",
        f"--include={','.join(userland.packages)}",
        *(f"--customize-hook={each}" for each in hooks),
    )


def _unpack(userland: Userland, directory: Path) -> None:
    """Unpack the release and the wheels of another architecture."""
    root = directory / "root"
    _debootstrap(userland, root, *foreign.OPTIONS)
    wheels = ("--no-index", f"--find-links={directory / 'wheels'}")
    foreign.complete(root, userland.python, partial(_pip, userland, "install", *wheels))


def _debootstrap(userland: Userland, root: Path, *options: str) -> None:
    _run(
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        f"--architectures={userland.architecture.name}",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        *options,
        userland.suite,
        root,
        source(userland.suite),
        environment=ENVIRONMENT,
    )


def _run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-20:]
        raise VmError("\n".join([f"{command[0]} failed:", *said]))
