# SPDX-License-Identifier: GPL-3.0-only
"""Describes the machine and the software versions of a run."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tcpexporter.version import VERSION
from tests.benchmarks import ROOT
from tests.benchmarks.contenders import node_exporter_command
from tests.benchmarks.exporter import BPF_FS

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
    packages = ("bcc", "numpy", "prometheus_client", "h11", "psutil", "matplotlib")
    return {
        "tcpexporter": VERSION,
        "revision": _revision(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "node_exporter": _first_word_after(
            "version", [str(node_exporter_command()), "--version"]
        ),
        "iproute2": _first_word_after("iproute2-", ["ss", "-V"]),
    }


def absent() -> list[str]:
    """Return a sentence for each thing that the benchmarks require and that is absent."""
    sentences = [
        f"the Python package {name} is not installed: run `make bench`"
        for name in ("psutil", "matplotlib")
        if find_spec(name) is None
    ]
    sentences += [
        f"{name} is not installed: install the distribution's iproute2 or awk"
        for name in ("ss", "awk")
        if shutil.which(name) is None
    ]
    if not BPF_FS.is_mount():
        sentences.append(f"bpffs is not mounted: mount -t bpf bpf {BPF_FS}")
    if node_exporter_command() is None:
        sentences.append("node_exporter is not installed: run `make bench`")
    return sentences


def command() -> str:
    """Return the command line of this run."""
    quick = "QUICK=1 " if os.environ.get("QUICK") else ""
    return quick + shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]])


def _revision() -> str:
    """Return the commit of the source tree, with ``-dirty`` if files have changed since."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    described = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.check_output([*git, *described], text=True).strip()


def _first_word_after(before: str, command: Sequence[str]) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return (said.stdout + said.stderr).partition(before)[2].split()[0].rstrip(",")


def _sysctl(path: str) -> int:
    return int(Path("/proc/sys", path).read_text())


def _value(path: Path, name: str) -> str:
    lines = path.read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))
