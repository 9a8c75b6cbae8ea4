# SPDX-License-Identifier: GPL-3.0-only
"""Returns freed memory to the kernel (glibc malloc settings)."""

from tcpexporter.host import libc

M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE_BYTES = 1 << 20


def limit_arenas() -> None:
    """Limit the freed memory that glibc keeps: mallopt(3).

    Every array of at least 1 MiB is returned to the kernel when it is freed. By default,
    glibc raises that threshold when it frees a larger array. One arena is enough, because
    the exporter's threads rarely allocate memory at the same time.
    """
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    libc.mallopt(M_ARENA_MAX, 1)


def return_memory() -> None:
    """Return freed memory between blocks in use to the kernel: malloc_trim(3)."""
    libc.malloc_trim()
