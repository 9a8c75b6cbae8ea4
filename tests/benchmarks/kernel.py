# SPDX-License-Identifier: GPL-3.0-only
"""Reads the kernel's account of a process and of the BPF program that it holds."""

import contextlib
import ctypes
import dataclasses
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tcpexporter.ebpf.libbpf import load_libbpf

BPF_STATS_RUN_TIME = 0
KIB_BYTES = 1024

MAP_IDS = struct.Struct("=IQ")
NR_MAP_IDS_AT = 52
"""Offsets of nr_map_ids and of the pointer map_ids in ``struct bpf_prog_info``."""

PROG_INFO_BYTES = 512
MOST_MAPS = 64


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, user and system (proc_pid_schedstat)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks)


@dataclass(frozen=True)
class Memory:
    """The memory of a process (proc_pid_status)."""

    resident_bytes: int
    peak_bytes: int
    """The peak of resident memory since the start."""
    anonymous_bytes: int
    """The part of resident memory that is the process's own."""
    mapped_bytes: int
    """The part of resident memory that is mapped from files and BPF maps."""

    @property
    def above_bytes(self) -> int:
        """The difference between peak and present resident memory."""
        return self.peak_bytes - self.resident_bytes


def memory(pid: int) -> Memory:
    fields = _fields(Path(f"/proc/{pid}/status"))
    resident, peak, anonymous, files, shared = (
        KIB_BYTES * int(fields[name].split()[0])
        for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")
    )
    return Memory(resident, peak, anonymous, files + shared)


@dataclass(frozen=True)
class Map:
    """A BPF map that a process holds (bpf_map_show_fdinfo in kernel/bpf/syscall.c)."""

    map_id: int
    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    map_flags: str
    memlock: int
    """Bytes of kernel memory that the map uses now."""


def maps(pid: int) -> list[Map]:
    """Return the maps of which the process has a descriptor, and those of its program."""
    descriptors = list(_descriptors(pid))
    by_id = {each["map_id"]: each for each in descriptors if "map_id" in each}
    for program in (each for each in descriptors if "prog_id" in each):
        by_id |= {each["map_id"]: each for each in _used_by(int(program["prog_id"]))}
    return [_map(fields) for fields in by_id.values()]


def _map(fields: Mapping[str, str]) -> Map:
    numbers = {each.name: fields[each.name] for each in dataclasses.fields(Map)}
    flags = numbers.pop("map_flags")
    return Map(map_flags=flags, **{name: int(value) for name, value in numbers.items()})


def _descriptors(pid: int) -> Iterator[dict[str, str]]:
    for each in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed in the meantime
            yield _fields(each)


def _used_by(program_id: int) -> Iterator[dict[str, str]]:
    """Return the maps that a program uses, with the fields of ``/proc/PID/fdinfo``."""
    libbpf = load_libbpf()
    program = _opened(libbpf.bpf_prog_get_fd_by_id(program_id))
    map_ids = (ctypes.c_uint32 * MOST_MAPS)()
    info = ctypes.create_string_buffer(PROG_INFO_BYTES)
    MAP_IDS.pack_into(info, NR_MAP_IDS_AT, len(map_ids), ctypes.addressof(map_ids))
    size = ctypes.c_uint32(len(info))
    libbpf.bpf_obj_get_info_by_fd(program, info, ctypes.byref(size))
    os.close(program)
    count, _ = MAP_IDS.unpack_from(info, NR_MAP_IDS_AT)
    for map_id in map_ids[:count]:
        opened = _opened(libbpf.bpf_map_get_fd_by_id(map_id))
        yield _fields(Path(f"/proc/self/fdinfo/{opened}"))
        os.close(opened)


def _opened(descriptor: int) -> int:
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf(2): {os.strerror(number)}")
    return descriptor


@dataclass(frozen=True)
class ProgramRuns:
    """Runs of a BPF program since it was loaded, or between two moments."""

    run_time_ns: int
    run_count: int
    missed: int
    """Runs that the kernel skipped because another program ran on that CPU."""

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


NO_RUNS = ProgramRuns(0, 0, 0)


class Program:
    """A BPF program.

    It is identified by a descriptor of it, because other exporters on this host have
    programs of the same name.
    """

    def __init__(self, fdinfo: Path) -> None:
        """Read the kernel's account from this file in ``/proc/PID/fdinfo``."""
        self._fdinfo = fdinfo

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """Return the only BPF program of a process."""
        descriptors = Path(f"/proc/{pid}/fdinfo").iterdir()
        return cls(next(each for each in descriptors if "run_cnt" in _fields(each)))

    def runs(self) -> ProgramRuns:
        """Return its runs since it was loaded (bpf_prog_show_fdinfo in
        kernel/bpf/syscall.c)."""
        fields = _fields(self._fdinfo)
        return ProgramRuns(
            int(fields["run_time_ns"]),
            int(fields["run_cnt"]),
            int(fields["recursion_misses"]),
        )


@contextlib.contextmanager
def bpf_stats() -> Iterator[None]:
    """Make the kernel time BPF programs during the block.

    A descriptor enables this since Linux 5.8, and has the effect of
    kernel.bpf_stats_enabled=1. The kernel ends it when the descriptor is closed, even if
    this process is killed. Other users of the statistics are not affected.
    """
    descriptor = _opened(load_libbpf().bpf_enable_stats(BPF_STATS_RUN_TIME))
    try:
        yield
    finally:
        os.close(descriptor)


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return {
        name: value.strip() for name, _, value in (each.partition(":") for each in lines)
    }
