# SPDX-License-Identifier: GPL-3.0-only
"""Debian's kernels under qemu's emulation, and the tests of the kernel in each of them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcpexporter-vm"
"""Kernels and root images: outside of the tree, as they are large and outlive it."""


class VmError(Exception):
    """A guest cannot be made or run; the message says why."""
