# SPDX-License-Identifier: GPL-3.0-only
"""Reads the host's CLOCK_BOOTTIME, with which the exporter measures connection ages."""

import time
from pathlib import Path


def _offset_ns(offsets: str) -> int:
    """Return this namespace's offset of CLOCK_BOOTTIME, in ns: time_namespaces(7)."""
    for line in offsets.splitlines():
        clock, seconds, nanoseconds = line.split()
        if clock == "boottime":
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0


def _own_offset_ns() -> int:
    try:
        return _offset_ns(Path("/proc/self/timens_offsets").read_text())
    except FileNotFoundError:  # a kernel without time namespaces
        return 0


_OFFSET_NS = _own_offset_ns()


def boottime_ns() -> int:
    """Return the nanoseconds since the host booted, including suspend.

    A container can have a time namespace with an offset. The BPF program's clock,
    bpf_ktime_get_boot_ns(), ignores that offset, so this function subtracts it.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - _OFFSET_NS
