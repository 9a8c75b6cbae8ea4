# SPDX-License-Identifier: GPL-3.0-only
"""Memory that is not needed any more, and that glibc would keep."""

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE_BYTES = 1 << 20

_libc = ctypes.CDLL(None)


def spare() -> None:
    """Have glibc keep less than it does by itself: mallopt(3).

    Every large array goes back to the kernel when it is done with, and not only those
    that are larger than any before. Threads take turns here, so one arena will do.
    """
    with contextlib.suppress(AttributeError):  # another C library
        _libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        _libc.mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Give the kernel what lies between things that are still needed: malloc_trim(3)."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(ctypes.c_size_t(0))
