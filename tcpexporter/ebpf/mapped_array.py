# SPDX-License-Identifier: GPL-3.0-only
"""Maps the used part of a BPF array map into memory, as a numpy array."""

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.host import libc

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
"""include/uapi/asm-generic/mman-common.h and mman.h."""


class MappedArray:
    """An array map that was made with BPF_F_MMAPABLE.

    When a range is mapped, the kernel maps all of its pages at once and counts them as
    resident (array_map_mmap in its kernel/bpf/arraymap.c). So this class only reserves
    addresses for the whole array. It maps one window after another to these addresses.
    """

    def __init__(
        self, descriptor: int, dtype: np.dtype[Any], entries: int, window: int
    ) -> None:
        """Reserve addresses for the array.

        Args:
            descriptor: the file descriptor of the map, which the caller keeps open.
            dtype: the dtype of an entry.
            entries: the length of the array.
            window: the number of entries that are mapped at once.

        Raises:
            OSError: the kernel refuses to reserve the addresses.
        """
        self._descriptor = descriptor
        self._window = window
        self._bytes = _whole_pages(entries * dtype.itemsize)
        self._mapped = 0
        self._growing = threading.Lock()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        with _refusals():
            self._address = libc.mmap(None, self._bytes, PROT_NONE, flags)
        reserved = _memory(self._address, self._bytes)
        self._entries: npt.NDArray[Any] = np.frombuffer(reserved, dtype, entries)

    def upto(self, entries: int) -> npt.NDArray[Any]:
        """Map windows until the first ``entries`` are mapped; return all of these windows.

        So the result can have more than ``entries`` elements.

        The BPF program may write to them at any time.

        Raises:
            OSError: the kernel refuses to map the entries.
        """
        windows = -(-entries // self._window)
        there = min(windows * self._window, len(self._entries))
        with self._growing:
            if there > self._mapped:
                self._map_from(self._mapped, there)
                self._mapped = there
        return self._entries[:there]

    def _map_from(self, first: int, last: int) -> None:
        start = first * self._entries.itemsize
        size = _whole_pages(last * self._entries.itemsize) - start
        with _refusals():
            libc.mmap(
                self._address + start,
                size,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | MAP_FIXED,
                self._descriptor,
                start,
            )


def map_entries(
    descriptor: int, dtype: np.dtype[Any], first: int, last: int
) -> npt.NDArray[Any]:
    """Map some entries of an array map, until the returned array is deleted.

    Args:
        descriptor: of the map, which the caller keeps open.
        dtype: of an entry.
        first: the index of the first entry, which must begin a page.
        last: the index after the last entry.

    Raises:
        OSError: the kernel refuses to map them.
    """
    size = _whole_pages((last - first) * dtype.itemsize)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with _refusals():
        address = libc.mmap(
            None, size, access, mmap.MAP_SHARED, descriptor, first * dtype.itemsize
        )
    return np.frombuffer(_memory(address, size), dtype, last - first)


def _memory(address: int, size: int) -> memoryview:
    """Return mapped memory, which is unmapped when nothing refers to it any more."""
    memory = (ctypes.c_char * size).from_address(address)
    unmapping = weakref.finalize(memory, libc.munmap, address, size)
    # Do not unmap at exit: a background thread may still read. The kernel unmaps it then.
    unmapping.atexit = False
    return memoryview(memory)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Raise each OSError of the block with a sentence as ``strerror``."""
    try:
        yield
    except OSError as error:
        sentence = f"the kernel refuses to map a BPF array: {error.strerror}"
        raise OSError(error.errno, sentence) from error
