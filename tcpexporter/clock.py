# SPDX-License-Identifier: GPL-3.0-only
"""Reads the clock of all times: the host's CLOCK_BOOTTIME, as the BPF program does."""

import time
from pathlib import Path


def _offset_ns(offsets: str) -> int:
    """The offset of this time namespace: time_namespaces(7), timens_offsets."""
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
    """Nanoseconds since the host booted, including suspend.

    A container can have a time namespace, which bpf_ktime_get_boot_ns() ignores.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - _OFFSET_NS
