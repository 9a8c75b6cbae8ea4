# SPDX-License-Identifier: GPL-3.0-only
"""Reads the maps of a running exporter, by copies of its descriptors."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from tcpexporter.connections.series import correction_dtype
from tcpexporter.ebpf.event_counters import EVENT_KINDS, RECURSION_MISSES_BYTES
from tcpexporter.ebpf.libbpf import load_libbpf
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import FIRST, Map, possible_cpus, program_info

SYS_PIDFD_GETFD = 438
"""System call number of pidfd_getfd(2), the same on every architecture."""

MAP_NAME = slice(24, 40)
MAP_MAX_ENTRIES = slice(16, 20)
"""Layout of the start of ``struct bpf_map_info``: include/uapi/linux/bpf.h."""

ENTRIES = 8192
"""Number of corrections that are read: more than the series of any test."""

Maps = dict[str, tuple[int, int]]
"""A descriptor and the size of each map, by name."""


@contextlib.contextmanager
def borrowed(process: int) -> Iterator[tuple[Maps, list[int]]]:
    """Yield the maps and programs that a process has open."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as undo:
        pidfd = os.pidfd_open(process)
        undo.callback(os.close, pidfd)
        maps, programs = {}, []
        for each in Path(f"/proc/{process}/fdinfo").iterdir():
            try:
                shown = each.read_text()
            except FileNotFoundError:  # it was closed in the meantime
                continue
            is_map, is_program = "map_id:" in shown, "prog_type:" in shown
            if not is_map and not is_program:
                continue
            descriptor = libc.syscall(SYS_PIDFD_GETFD, pidfd, int(each.name), 0)
            undo.callback(os.close, descriptor)
            if is_program:
                programs.append(descriptor)
                continue
            info = ctypes.create_string_buffer(256)
            size = ctypes.c_uint32(len(info))
            load_libbpf().bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size))
            name = info.raw[MAP_NAME].partition(b"\0")[0].decode()
            maps[name] = descriptor, int.from_bytes(info.raw[MAP_MAX_ENTRIES], "little")
        yield maps, programs


@dataclass(frozen=True)
class Moment:
    """What the program and the exporter had counted at a moment."""

    seen: int
    """Events that the program has recorded."""
    unseen: int
    """Events that it did not get, refused or ignored."""
    opened: int
    closed: int
    pre_existing: int
    """Corrections of the ledger by the exporter."""

    def changes_since(self, before: "Moment") -> int:
        """Return the number of changes that the ledger or the records had in between."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return sum(abs(now - then) for now, then in pairs)


class KernelCounts:
    """What the program of a running exporter counts, without a scrape."""

    def __init__(self, maps: Maps, programs: list[int], buckets: int) -> None:
        self._events = Map(maps["events"][0], "events")
        (self._program,) = programs
        self.cpus = possible_cpus()
        descriptor, entries = maps["corrections"]
        entry = correction_dtype(buckets)
        array = MappedArray(descriptor, entry, entries, ENTRIES)
        self._corrections = array.upto(ENTRIES)

    @classmethod
    @contextlib.contextmanager
    def of(cls, process: int, buckets: int) -> "Iterator[KernelCounts]":
        """Yield the counts of an exporter with this number of lifetime buckets."""
        with borrowed(process) as (maps, programs):
            yield cls(maps, programs, buckets)

    def now(self) -> Moment:
        counts = np.zeros((self.cpus, len(EVENT_KINDS)), np.uint64)
        self._events.read(FIRST, counts)
        events = dict(zip(EVENT_KINDS, counts.sum(axis=0).tolist(), strict=True))
        info = program_info(self._program)
        skipped = int(info[RECURSION_MISSES_BYTES // info.itemsize])
        corrections = self._corrections
        opened, closed, pre_existing = (
            int(corrections[name].astype(np.int64).sum())
            for name in ("opened", "closed", "pre_existing")
        )
        return Moment(
            events["inserted"] + events["removed"],
            skipped + events["refused"] + events["unrecorded"],
            opened,
            closed,
            pre_existing,
        )
