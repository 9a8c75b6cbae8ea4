# SPDX-License-Identifier: GPL-3.0-only
"""Downloads packages of other Debian suites, from the host's package mirror."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.vm import VmError
from tests.vm.architectures import Architecture

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEPENDENCY = re.compile(r"^ +Depends: ([^<\s]+)$", re.MULTILINE)


def mirror(label: str = "Debian") -> str:
    """Return the host's mirror of packages with this label.

    Raises:
        VmError: the host has no such mirror, because it is not a Debian system.
    """
    targets = ("Created-By: Packages", f"Label: {label}")
    found = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", *targets).split()
    if not found:
        raise VmError(
            f"apt has no source labelled {label!r}: add Debian's to "
            "/etc/apt/sources.list.d, and its keys (debian-archive-keyring)"
        )
    return found[0]


class Apt:
    """Runs apt with its own lists and sources; it installs nothing on the host."""

    def __init__(self, state: Path, architecture: Architecture, *suites: str) -> None:
        """Download the lists of packages.

        Args:
            state: Directory of the lists.
            architecture: The architecture of the packages.
            suites: Names of suites such as ``bookworm-backports``. A suite of security
                updates is recognized by its name.

        Raises:
            VmError: the lists cannot be downloaded; the message has the reason.
        """
        for each in ("lists/partial", "cache/archives/partial", "parts"):
            (state / each).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        sources = state / "sources.list"
        sources.write_text("".join(f"{source(suite)}\n" for suite in suites))
        self._options = [
            f"-oDir::Etc::sourcelist={sources}",
            f"-oDir::Etc::sourceparts={state / 'parts'}",
            f"-oDir::State={state}",
            f"-oDir::State::status={state / 'status'}",
            f"-oDir::Cache={state / 'cache'}",
            "-oAPT::Sandbox::User=root",
            f"-oAPT::Architecture={architecture.name}",
            f"-oAPT::Architectures={architecture.name}",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
        ]
        self("apt-get", "update", "-q", "--error-on=any")

    def __call__(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        return _run(command, *self._options, *arguments, cwd=cwd)

    def version(self, package: str) -> str:
        """Return the newest version of a package."""
        shown = self("apt-cache", "show", "--no-all-versions", package)
        return next(
            line.split()[1] for line in shown.splitlines() if line.startswith("Version:")
        )

    def dependencies(self, package: str) -> list[str]:
        """Return the packages that a package depends on."""
        return DEPENDENCY.findall(self("apt-cache", "depends", package))

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download packages and unpack them, without installing them."""
        archives = into.with_name(f"{into.name}.archives")
        archives.mkdir(parents=True, exist_ok=True)
        self("apt-get", "download", "-q", *packages, cwd=archives)
        for archive in archives.iterdir():
            _run("dpkg", "-x", str(archive), str(into))
            archive.unlink()
        archives.rmdir()


def source(suite: str) -> str:
    """Return a line of sources.list(5)."""
    label = "Debian-Security" if suite.endswith("-security") else "Debian"
    return f"deb [signed-by={KEYRING}] {mirror(label)} {suite} main"


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "; ".join(
            line for line in done.stderr.splitlines() if line[:2] in ("E:", "dp")
        )
        raise VmError(f"{command[0]} {command[-1]}: {said or done.stderr.strip()}")
    return done.stdout
