# SPDX-License-Identifier: GPL-3.0-only
"""Reads and changes BPF maps by bpf(2), with keys and values in numpy arrays."""

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tcpexporter.ebpf.libbpf import load_libbpf
from tcpexporter.errors import TrackerError

BPF_NOEXIST = 1

FIRST = np.uint32(0)
"""The key of maps with one entry."""

CHUNK = 4096
"""Maximum number of entries that one system call copies from a map."""

OUT_OF_MEMORY_S = 0.001
OUT_OF_MEMORY_TRIES = 100
"""Pause of a batch update that lacks memory, and its number of tries without progress.

A hash map without preallocated entries allocates memory in advance, in small batches. A
batch update can use up that memory faster than the kernel allocates more.
"""

Keys = npt.NDArray[Any]
"""A one-dimensional array of keys, of the dtype that the map requires."""


@contextlib.contextmanager
def map_errors() -> Iterator[None]:
    """Raise each OSError of the block, which only uses maps, as a `TrackerError`."""
    try:
        yield
    except OSError as error:
        raise TrackerError(error.strerror) from error


class Map:
    """A BPF map.

    Every method raises OSError if the kernel refuses the operation; ``strerror`` is a
    sentence that names the operation and the map.
    """

    def __init__(self, descriptor: int, what: str) -> None:
        """Use the map of a descriptor; the caller keeps it open and closes it.

        Args:
            descriptor: the file descriptor of the map.
            what: the name of the map in error messages.

        Raises:
            SourceError: libbpf is not installed.
        """
        self.descriptor = descriptor
        self._what = what
        self._libbpf = load_libbpf()

    def read(self, key: np.generic, into: Keys) -> None:
        """Copy the value of a key into an array; the map must have the key."""
        if not self._call("bpf_map_lookup_elem", np.array([key]), into):
            raise self._refusal("read")

    def look_up(self, key: np.generic, into: Keys) -> bool:
        """Fill an array with the value of a key; return whether the map has the key."""
        found = self._call("bpf_map_lookup_elem", np.array([key]), into)
        if not found and ctypes.get_errno() != errno.ENOENT:
            raise self._refusal("read")
        return found

    def put(self, key: np.generic, value: np.generic) -> None:
        """Set the value of a key."""
        if not self._update(key, value, 0):
            raise self._refusal("write to")

    def put_new(self, key: np.generic, value: np.generic) -> bool:
        """Add a key and its value; return False if the map already has the key."""
        added = self._update(key, value, BPF_NOEXIST)
        if not added and ctypes.get_errno() != errno.EEXIST:
            raise self._refusal("add to")
        return added

    def push(self, value: np.generic) -> None:
        """Put a value on top of a stack."""
        if not self._update(None, value, 0):
            raise self._refusal("push to")

    def pop(self, dtype: type[np.generic]) -> Any:
        """Remove the value on top of a stack and return it; None if the stack is empty."""
        value = np.empty(1, dtype)
        if self._call("bpf_map_lookup_and_delete_elem", None, value):
            return value[0]
        if ctypes.get_errno() != errno.ENOENT:
            raise self._refusal("pop from")
        return None

    def put_all(self, keys: Keys, values: Keys) -> int:
        """Set the values of many keys in order; return how many were set.

        They are fewer than ``keys`` if the map is full or the kernel lacks memory.
        """
        done = 0
        tries = OUT_OF_MEMORY_TRIES
        while done < len(keys) and tries:
            count = ctypes.c_uint32(len(keys) - done)
            if self._call("bpf_map_update_batch", keys[done:], values[done:], count, None):
                return len(keys)
            if ctypes.get_errno() not in (errno.E2BIG, errno.ENOMEM):
                raise self._refusal("add to")
            tries = OUT_OF_MEMORY_TRIES if count.value else tries - 1
            done += count.value
            if ctypes.get_errno() == errno.E2BIG:
                break
            time.sleep(OUT_OF_MEMORY_S)
        return done

    def delete_all(self, keys: Keys) -> None:
        """Delete many keys; ignore keys that the map does not have."""
        keys = np.ascontiguousarray(keys)
        while len(keys):
            count = ctypes.c_uint32(len(keys))
            if self._call("bpf_map_delete_batch", keys, count, None):
                return
            if ctypes.get_errno() != errno.ENOENT:
                raise self._refusal("delete from")
            # The kernel stops at the first key that the map does not have.
            keys = keys[count.value + 1 :]

    def items(
        self, key: npt.DTypeLike, value: npt.DTypeLike, *, delete: bool = False
    ) -> tuple[Keys, Keys]:
        """Return all keys, of dtype ``key``, and their values, of dtype ``value``.

        With ``delete``, the kernel deletes each batch of them as it copies it.
        """
        function = "bpf_map_lookup_and_delete_batch" if delete else "bpf_map_lookup_batch"
        keys, values = np.empty(CHUNK, key), np.empty(CHUNK, value)
        found = [(keys[:0], values[:0])]
        position: ctypes.c_uint32 | None = None
        following = ctypes.c_uint32()
        finished = False
        while not finished:
            count = ctypes.c_uint32(CHUNK)
            if not self._call(function, position, following, keys, values, count, None):
                if ctypes.get_errno() != errno.ENOENT:
                    raise self._refusal("read")
                finished = True
            position = ctypes.c_uint32(following.value)
            found.append((keys[: count.value].copy(), values[: count.value].copy()))
        all_keys, all_values = (np.concatenate(each) for each in zip(*found, strict=True))
        return all_keys, all_values

    def _update(self, key: np.generic | None, value: np.generic, flags: int) -> bool:
        at = None if key is None else np.array([key])
        number = ctypes.c_uint64(flags)
        return self._call("bpf_map_update_elem", at, np.array([value]), number)

    def _call(self, function: str, *arguments: Any) -> bool:
        """Return whether a function of libbpf succeeded; if not, it set the errno."""
        passed = [_passed(argument) for argument in arguments]
        result = getattr(self._libbpf, function)(ctypes.c_int(self.descriptor), *passed)
        return bool(result == 0)

    def _refusal(self, operation: str) -> OSError:
        return refusal(f"{operation} the map of {self._what}")


def _passed(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, ctypes.c_uint32):  # the kernel writes to it
        return ctypes.byref(argument)
    return argument


_ProgramInfo = ctypes.c_uint64 * 64


def program_info(descriptor: int) -> npt.NDArray[np.uint64]:
    """Return ``struct bpf_prog_info`` of a program as 64 words of 64 bits.

    Fields that the kernel does not have are 0.

    Raises:
        OSError: the kernel refuses to describe the program.
    """
    info = _ProgramInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    into = ctypes.byref(info), ctypes.byref(size)
    if load_libbpf().bpf_obj_get_info_by_fd(descriptor, *into):
        raise refusal("describe the BPF program")
    return np.frombuffer(memoryview(info), np.uint64)


def refusal(operation: str) -> OSError:
    """Return an error for the last C call that failed, with a sentence as ``strerror``."""
    number = ctypes.get_errno()
    return OSError(number, f"the kernel refuses to {operation}: {os.strerror(number)}")


def possible_cpus() -> int:
    """Return the number of CPUs that this kernel can have.

    A per-CPU map has a value for each of them: Documentation/admin-guide/cputopology.rst.
    """
    return cpus_in(Path("/sys/devices/system/cpu/possible").read_text())


def cpus_in(ranges: str) -> int:
    """Return the number of CPUs in ranges such as ``0-3,8-11``."""
    return sum(
        int(last or first) - int(first) + 1
        for first, _, last in (each.partition("-") for each in ranges.strip().split(","))
    )
