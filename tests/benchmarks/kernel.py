# SPDX-License-Identifier: GPL-3.0-only
"""What the kernel says about a process and about the BPF program that it holds."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tcpexporter.libbpf import load_libbpf

BPF_STATS_RUN_TIME = 0
KIB_BYTES = 1024


def cpu_ns(pid: int) -> int:
    """What its threads have run on a CPU, in the kernel too (proc_pid_schedstat)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks)


def resident_bytes(pid: int) -> int:
    return KIB_BYTES * int(_fields(Path(f"/proc/{pid}/status"))["VmRSS"].split()[0])


@dataclass(frozen=True)
class ProgramRuns:
    """Of a BPF program, since it was loaded or between two moments."""

    run_time_ns: int
    run_count: int
    missed: int
    """Times that it should have run, but another program ran on that CPU."""

    def __sub__(self, before: Self) -> "ProgramRuns":
        return ProgramRuns(
            self.run_time_ns - before.run_time_ns,
            self.run_count - before.run_count,
            self.missed - before.missed,
        )

    def __add__(self, other: Self) -> "ProgramRuns":
        return ProgramRuns(
            self.run_time_ns + other.run_time_ns,
            self.run_count + other.run_count,
            self.missed + other.missed,
        )

    @property
    def mean_ns(self) -> float:
        return self.run_time_ns / self.run_count


class Program:
    """The one BPF program that a process holds.

    Known by descriptor and not by name: there may be other exporters on this host.
    """

    def __init__(self, pid: int) -> None:
        descriptors = Path(f"/proc/{pid}/fdinfo").iterdir()
        self._fdinfo = next(each for each in descriptors if "prog_id" in _fields(each))

    def runs(self) -> ProgramRuns:
        """Since it was loaded (bpf_prog_show_fdinfo in kernel/bpf/syscall.c)."""
        fields = _fields(self._fdinfo)
        return ProgramRuns(
            int(fields["run_time_ns"]),
            int(fields["run_cnt"]),
            int(fields["recursion_misses"]),
        )


@contextlib.contextmanager
def bpf_stats() -> Iterator[None]:
    """Have the kernel time BPF programs, as kernel.bpf_stats_enabled=1 does.

    By descriptor, since Linux 5.8: however this process ends, nothing has to be restored,
    and who else wants the statistics keeps them.
    """
    descriptor = load_libbpf().bpf_enable_stats(BPF_STATS_RUN_TIME)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"BPF_ENABLE_STATS: {os.strerror(number)}")
    try:
        yield
    finally:
        os.close(descriptor)


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return {
        name: value.strip() for name, _, value in (each.partition(":") for each in lines)
    }
