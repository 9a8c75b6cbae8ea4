# SPDX-License-Identifier: GPL-3.0-only
"""Builds two Debian packages of this tree, an earlier and a later one."""

import os
import subprocess
import time
from pathlib import Path

from tests.vm import ROOT, VmError

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
        environ = {
            "FOR_RELEASE": release,
            "REVISION": revision,
            "SOURCE_DATE_EPOCH": f"{time.time():.0f}",
        }
        done = subprocess.run(
            [ROOT / "deploy" / "deb.sh", into],
            env=os.environ | FAST | environ,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise VmError(f"deploy/deb.sh failed: {done.stderr[-1000:]}")
