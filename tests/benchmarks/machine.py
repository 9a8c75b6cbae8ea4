# SPDX-License-Identifier: GPL-3.0-only
"""Where and with what it is measured."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tcpexporter.version import VERSION

ROOT = Path(__file__).parents[2]
"""Of the source tree."""

KIB_BYTES = 1024


def machine() -> dict[str, str | int]:
    memory_kib = _value(Path("/proc/meminfo"), "MemTotal").split()[0]
    return {
        "cpu": _value(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory_kib) * KIB_BYTES,
    }


def kernel() -> dict[str, str | int]:
    return {
        "release": platform.release(),
        "version": platform.version(),
        "bpf_stats_enabled": _sysctl("kernel/bpf_stats_enabled"),
        "bpf_jit_enable": _sysctl("net/core/bpf_jit_enable"),
    }


def versions() -> dict[str, str]:
    packages = ("bcc", "numpy", "prometheus_client", "uvicorn")
    return {
        "tcpexporter": VERSION,
        "revision": _revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def command() -> str:
    """What was run, to run it again."""
    quick = "QUICK=1 " if os.environ.get("QUICK") else ""
    return quick + shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]])


def _revision() -> str:
    """Of the tree that is measured; says ``-dirty`` where that is not all of it."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    described = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.check_output([*git, *described], text=True).strip()


def _sysctl(path: str) -> int:
    return int(Path("/proc/sys", path).read_text())


def _value(path: Path, name: str) -> str:
    lines = path.read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))
