# SPDX-License-Identifier: GPL-3.0-only
"""Runs the kernel tests on Debian's kernels, in guests that qemu emulates."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcpexporter-vm"
"""Directory of kernels and root images; they are large, so it is outside of the tree."""


class VmError(Exception):
    """A guest cannot be built or run; the message has the reason."""
