# SPDX-License-Identifier: GPL-3.0-only
"""Returns freed memory to the kernel (glibc malloc settings)."""

from tcpexporter.host import libc

M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE_BYTES = 1 << 20


def limit_arenas() -> None:
    """Limit what glibc keeps of freed memory: mallopt(3).

    Every array of at least 1 MiB is returned to the kernel when it is freed; by default
    glibc raises that threshold with each larger array. One arena is enough, as threads
    rarely allocate at the same time here.
    """
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    libc.mallopt(M_ARENA_MAX, 1)


def return_memory() -> None:
    """Return freed memory between allocations that are still used: malloc_trim(3)."""
    libc.malloc_trim()
