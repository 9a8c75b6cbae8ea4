# SPDX-License-Identifier: GPL-3.0-only
"""Prints facts about the guest in which it runs, as one JSON line for the table."""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

import bcc

from tcpexporter.ebpf.features import FEATURES, Kernel

COMPILERS = ("cc", "gcc", "clang", "cpp")


def main() -> None:
    system, kernel = os.uname(), Kernel()
    facts = {
        "release": system.release,
        # "#1 SMP Debian 6.1.192-2 (2026-11-16)"
        "version": system.version,
        "python": platform.python_version(),
        "bcc": bcc.__version__,
        "lacks": [each.name for each in FEATURES if not kernel.has(each)],
        "has_headers": Path(f"/lib/modules/{system.release}/build").exists(),
        "has_compiler": any(map(shutil.which, COMPILERS)),
    }
    sys.stdout.write(f"{json.dumps(facts)}\n")


if __name__ == "__main__":
    main()
