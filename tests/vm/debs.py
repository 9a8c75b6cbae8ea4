# SPDX-License-Identifier: GPL-3.0-only
"""Builds Debian packages of this tree, for guests that install them."""

import os
import subprocess
import time
from pathlib import Path

from tests.vm import CACHE, ROOT, VmError
from tests.vm.apt import Apt
from tests.vm.architectures import Architecture

FAST = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1"}
"""Compressing as ``make deb`` does would take half a minute."""


def build(into: Path, release: str) -> None:
    """Build the packages with the revisions 1 and 2.

    Args:
        into: Directory for the packages.
        release: The release of Debian that the packages are for, such as debian13.

    Raises:
        VmError: a package cannot be built; the message has the reason.
    """
    for revision in ("1", "2"):
        _build(into, {"FOR_RELEASE": release, "REVISION": revision})


def build_for(architecture: Architecture, suite: str, into: Path) -> None:
    """Build a package for another architecture, and check that it can be installed.

    Args:
        architecture: The architecture of the package.
        suite: The release of Debian, that of this machine.
        into: The directory of the package.

    Raises:
        VmError: the package cannot be built, or apt finds no packages of the suite that
            satisfy its dependencies; the message has the reason.
    """
    _build(into, {"FOR_ARCH": architecture.name})
    (package,) = into.glob("*.deb")
    apt = Apt(CACHE / "apt" / f"{suite}-{architecture.name}", architecture, suite)
    apt("apt-get", "install", "--simulate", "--no-install-recommends", str(package))


def _build(into: Path, environ: dict[str, str]) -> None:
    now = {"SOURCE_DATE_EPOCH": f"{time.time():.0f}"}
    done = subprocess.run(
        [ROOT / "deploy" / "deb.sh", into],
        env=os.environ | FAST | now | environ,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise VmError(f"deploy/deb.sh failed: {done.stderr[-1000:]}")
