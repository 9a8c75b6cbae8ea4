# SPDX-License-Identifier: GPL-3.0-only
"""Measures the memory that counts towards MemoryMax= of the exporter's unit.

    python -m tests.benchmarks.memory_limit --connections 131000 --max-connections 262144

It runs the exporter in a memory cgroup with a limit, as systemd does, and prints a row for
the table in docs/performance.md. The exporter starts twice, with --pin: it first reads the
socket tables, and then adopts the pinned maps of the first start.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.exporter import (
    AS_PROMETHEUS,
    COMMAND,
    NoNumberError,
    Scraper,
    pin_directory,
)
from tests.benchmarks.hold import held
from tests.benchmarks.number_format import format_bytes
from tests.kernel.helpers.memory_cgroup import memory_cgroup
from tests.support import Exporter, inside, new_netns

SCRAPES = 20
RECONCILIATIONS = 2
DEADLINE_S = 600.0

ALWAYS_RECONCILE = ("--reconcile-interval", "1", "--reconcile-cpu", "100")

PEAK = ("memory.max_usage_in_bytes", "memory.peak")
"""The files with the peak, of cgroup version 1 and of version 2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=131_000)
    parser.add_argument("--max-connections", type=int, default=262_144)
    parser.add_argument("--limit-mib", type=int, default=1024)
    arguments = parser.parse_args()
    flags = ("--max-connections", str(arguments.max_connections), *ALWAYS_RECONCILE)
    with (
        new_netns() as netns,
        inside(netns),
        held(arguments.connections),
        memory_cgroup(arguments.limit_mib) as processes,
        pin_directory() as pins,
    ):
        cgroup, peaks = processes.parent, []
        for _ in range(2):
            with _limited(processes, *flags, "--pin", str(pins)) as exporter:
                tracked = _work(exporter)
                kernel_bytes = _kernel_bytes(cgroup)
            peaks.append(_peak_bytes(cgroup))
    sizes = map(format_bytes, (kernel_bytes, *peaks))
    row = (f"{arguments.max_connections:,}", f"{tracked:,}", *sizes)
    sys.stdout.write(f"| {' | '.join(row)} |\n")


@contextlib.contextmanager
def _limited(processes: Path, *arguments: str) -> Iterator[Exporter]:
    """Start an exporter in the cgroup with this cgroup.procs; end it with SIGTERM."""
    script = f'echo $$ >{processes}; exec "$@"'
    command = ("sh", "-c", script, "sh", *COMMAND)
    with Exporter(*arguments, command=command, wait=False) as exporter:
        until_s = time.monotonic() + DEADLINE_S
        while not exporter.is_ready():
            if exporter.process.poll() is not None or time.monotonic() > until_s:
                _, log = exporter.stop()
                raise NoNumberError(f"the exporter is not ready:\n{log}")
            time.sleep(0.1)
        yield exporter
        exporter.stop()


def _work(exporter: Exporter) -> int:
    """Scrape until the exporter has reconciled; return the tracked connections."""
    with Scraper(exporter.port) as scraper:
        for _ in range(SCRAPES):
            scraper.get(AS_PROMETHEUS)
        until_s = time.monotonic() + DEADLINE_S
        while scraper.reconciliations() < RECONCILIATIONS:
            if time.monotonic() > until_s:
                raise NoNumberError("the exporter does not reconcile")
            time.sleep(0.3)
        return int(scraper.values()["tcpexporter_tracked_connections", ""])


def _kernel_bytes(cgroup: Path) -> int:
    """Return the kernel memory of a cgroup, most of which are the BPF maps."""
    version_1 = cgroup / "memory.kmem.usage_in_bytes"
    if version_1.exists():
        return int(version_1.read_text())
    lines = (cgroup / "memory.stat").read_text().splitlines()
    (shown,) = (line.split()[1] for line in lines if line.startswith("kernel "))
    return int(shown)


def _peak_bytes(cgroup: Path) -> int:
    (path,) = (cgroup / each for each in PEAK if (cgroup / each).exists())
    return int(path.read_text())


if __name__ == "__main__":
    main()
