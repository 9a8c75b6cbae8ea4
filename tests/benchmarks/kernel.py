# SPDX-License-Identifier: GPL-3.0-only
"""What the kernel says about a process and about the BPF program that it holds."""

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
"""Where nr_map_ids and the pointer map_ids are in ``struct bpf_prog_info``."""

PROG_INFO_BYTES = 512
MOST_MAPS = 64


def cpu_ns(pid: int) -> int:
    """What its threads have run on a CPU, in the kernel too (proc_pid_schedstat)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks)


@dataclass(frozen=True)
class Memory:
    """Of a process (proc_pid_status)."""

    resident_bytes: int
    peak_bytes: int
    """The most that was resident at once, since it was started."""
    anonymous_bytes: int
    """Of the resident: what is its own."""
    mapped_bytes: int
    """Of the resident: pages of files, and of BPF maps that it has mapped."""

    @property
    def above_bytes(self) -> int:
        """What was needed once and is not resident now."""
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
    """Bytes of the kernel that it takes now."""


def maps(pid: int) -> list[Map]:
    """Those that it has a descriptor of, and those that only its program uses."""
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
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            yield _fields(each)


def _used_by(program_id: int) -> Iterator[dict[str, str]]:
    """The maps of a program, as ``/proc/PID/fdinfo`` has them."""
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
        self._fdinfo = next(each for each in descriptors if "run_cnt" in _fields(each))

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
