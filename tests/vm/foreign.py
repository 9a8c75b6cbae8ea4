# SPDX-License-Identifier: GPL-3.0-only
"""Unpacks a release of Debian for another architecture than the host's.

No program of that architecture runs on the host: that would require binfmt_misc, which a
container may not have, and takes eight times as long. So no script of a package runs.
This module does the part of their work that the tests depend on.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

from tests.vm import ROOT

PACKAGES = (
    *("kmod", "passwd", "mount", "python3"),
    # What `deploy/setup.sh guest` installs.
    *("python3-bpfcc", "libseccomp2", "iproute2"),
)

HOOKS = "/usr/share/mmdebstrap/hooks/maybe-merged-usr"

OPTIONS = (
    "--variant=extract",
    "--skip=check/qemu",
    f"--hook-dir={HOOKS}",
    "--include=?essential",
    f"--include={','.join(PACKAGES)}",
)
"""Options of mmdebstrap, instead of those that install packages."""

TREE = Path("/tcpexporter")
"""Where guests have the source tree."""


def complete(root: Path, python: str, install: Callable[..., None]) -> None:
    """Do the work of the packages' scripts, and fill the virtual environment.

    Args:
        root: The unpacked release.
        python: The version of its Python, such as 3.11.
        install: Runs pip with arguments for the guest's Python.
    """
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    (root / "usr/bin/awk").symlink_to("mawk")
    # Otherwise pyroute2 does not find the namespaces that ip(8) makes.
    run = root / "var/run"
    if not run.is_symlink():
        run.rmdir()
        run.symlink_to("/run")
    _fill_venv(root / TREE.relative_to("/") / ".venv", python, install)
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        _compile(root, "usr/lib/python3", f"usr/lib/python{python}", "tcpexporter/.venv")


def _fill_venv(venv: Path, python: str, install: Callable[..., None]) -> None:
    """Make what `deploy/setup.sh guest` makes: packages, and the exporter of the tree."""
    packages = venv / f"lib/python{python}/site-packages"
    packages.mkdir(parents=True)
    install("--no-deps", f"--target={packages}")
    for each in distribution("tcpexporter").files or ():
        if each.suffix != ".pyc":
            path = packages / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(each.read_text().replace(str(ROOT), str(TREE)))
            shutil.copymode(each.locate(), path)
    (venv / "bin/python").symlink_to("/usr/bin/python3")
    settings = ("home = /usr/bin", "include-system-site-packages = true")
    (venv / "pyvenv.cfg").write_text("\n".join([*settings, f"version = {python}", ""]))


def _compile(root: Path, *directories: str) -> None:
    """Compile Python modules, which the guest would do at each boot."""
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "-s", root, "-p", "/",
         *(root / each for each in directories)],
        stdout=subprocess.DEVNULL,
        check=False,  # Debian has files that are not for this version
    )  # fmt: skip
