# SPDX-License-Identifier: GPL-3.0-only
"""Unpacks kubectl, whose command `kubectl kustomize` renders deploy/kubernetes.

    python -m tests.container.kubectl

It is the kubectl of Debian 13: that of Debian 12 is from 2021 and knows no components. It
requires nothing but the C library, and is not installed.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tests.vm import VmError
from tests.vm.apt import Apt
from tests.vm.architectures import AMD64

ROOT = Path(__file__).parents[2]
KUBECTL = ROOT / ".cache" / "kubectl" / "usr" / "bin" / "kubectl"


def fetch() -> None:
    """Download the package and unpack it, unless it is there.

    Raises:
        VmError: it cannot be downloaded; the message has the reason.
    """
    if KUBECTL.exists():
        return
    KUBECTL.parents[3].mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KUBECTL.parents[3]) as scratch:
        new = Path(scratch, "tree")
        Apt(Path(scratch, "apt"), AMD64, "trixie").unpack(["kubectl"], new)
        shutil.rmtree(KUBECTL.parents[2], ignore_errors=True)
        new.rename(KUBECTL.parents[2])


if __name__ == "__main__":
    try:
        fetch()
    except VmError as error:
        sys.exit(f"kubectl: {error}")
