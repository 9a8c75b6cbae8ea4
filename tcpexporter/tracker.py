# SPDX-License-Identifier: GPL-3.0-only
"""The BPF program's maps: reads them, adds seeds to them and takes seeds from them.

There are two maps with the same layout. ``tracked`` is what the tracepoint
told: only the kernel adds to it. ``seeded`` is what was found in the socket
tables: only this module adds to it, the kernel takes a connection out of it
when that closes. So seeds are added in bulk, and no seed can ever overwrite a
timestamp that the kernel gave.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tcpexporter.connections import CONNECTION, KEY, VALUE, Records, contains
from tcpexporter.errors import TrackerError
from tcpexporter.libbpf import load_libbpf
from tcpexporter.loader import Loaded

UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, 524)
"""What a kernel says to LOOKUP_AND_DELETE on a hash map that does not have it (524 is
ENOTSUPP): it came with Linux kernel commit 3e87f192b405 ("bpf: Add
lookup_and_delete_elem support to hashtab") (in v5.14)."""

CHUNK = 4096
"""Entries that are copied out of a map by one system call."""

RECURSION_MISSES_BYTES = 208
"""Where it is in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""

EVENT_KINDS = ("inserted", "removed", "refused")
"""``struct tracker_events``, in its order."""


class Tracker:
    """The connections that the BPF program tracks, and the seeds beside them."""

    def __init__(self, loaded: Loaded) -> None:
        self.knows_netns = loaded.knows_netns
        self.seeds_refused = 0
        """For how many seeds there has been no room, each time that they were added."""
        self.seeds_read = 0
        """How many of the connections that were read last are seeds."""
        self._counts_misses = loaded.counts_misses
        self._descriptors = loaded.descriptors
        # A reader waits while a connection may be in both maps.
        self._adding = threading.Lock()
        self._libbpf = load_libbpf()
        self._cpus = possible_cpus(Path("/sys/devices/system/cpu/possible").read_text())

    def close(self) -> None:
        """Detach the program; nothing of it is left in the kernel."""
        self._descriptors.close()

    def read(self) -> Iterator[Records]:
        """Every connection, in chunks of dtype `CONNECTION`, valid until the next one.

        What is there throughout is read exactly once; what comes or goes
        meanwhile may or may not be.

        Raises:
            TrackerError: the kernel refuses it.
        """
        with self._adding:
            yield from self.tracked()
            seeds_read = 0
            for chunk in self.seeded():
                seeds_read += len(chunk)
                yield chunk
        self.seeds_read = seeds_read

    def tracked(self) -> Iterator[Records]:
        """The connections that the tracepoint told of, as `read` gives them."""
        return self._read_map(self._descriptors.tracked)

    def seeded(self) -> Iterator[Records]:
        """The connections that were found in the socket tables, as `read` gives them."""
        return self._read_map(self._descriptors.seeded)

    def add_seeds(self, seeds: Records) -> int:
        """Add connections of dtype `CONNECTION`, but those that the tracepoint told of.

        Returns:
            How many found no room.

        Raises:
            TrackerError: the kernel refuses it.
        """
        with self._adding:
            refused = self._update_seeds(seeds)
            self.seeds_refused += refused
            for chunk in self.tracked():
                told = chunk["key"]
                self.remove_seeds(told[contains(told, seeds["key"])])
        return refused

    def _update_seeds(self, seeds: Records) -> int:
        keys = np.ascontiguousarray(seeds["key"])
        values = np.ascontiguousarray(seeds["value"])
        count = ctypes.c_uint32(len(seeds))
        if not len(seeds) or self._call(
            "bpf_map_update_batch", self._descriptors.seeded, keys, values, count
        ):
            return 0
        if ctypes.get_errno() != errno.E2BIG:
            raise _refused("add to the map of seeds")
        return len(seeds) - count.value

    def remove_seeds(self, keys: Records) -> None:
        """Take seeds out, by their keys; those that are gone already are passed over.

        Raises:
            TrackerError: the kernel refuses it.
        """
        keys = np.ascontiguousarray(keys)
        while len(keys):
            count = ctypes.c_uint32(len(keys))
            if self._call("bpf_map_delete_batch", self._descriptors.seeded, keys, count):
                return
            if ctypes.get_errno() != errno.ENOENT:
                raise _refused("take from the map of seeds")
            # It stops at the first that is not there.
            keys = keys[count.value + 1 :]

    def remove_tracked(self, connections: Records) -> Records:
        """Take out what the tracepoint told of, where it is still the same.

        Args:
            connections: of dtype `CONNECTION`, as they were read.

        Returns:
            What was taken out instead, as the kernel had put something newer there.

        Raises:
            TrackerError: the kernel refuses it.
        """
        taken = []
        for connection in connections:
            found = np.zeros(1, CONNECTION)
            found["key"] = connection["key"]
            if self._take_tracked(found) and found.tobytes() != connection.tobytes():
                taken.append(found)
        return np.concatenate(taken) if taken else np.empty(0, CONNECTION)

    def _take_tracked(self, found: Records) -> bool:
        """Take out what has that key, if anything has, and fill in its value."""
        key = np.ascontiguousarray(found["key"])
        value = np.zeros(1, VALUE)
        tracked = self._descriptors.tracked
        taken = self._call("bpf_map_lookup_and_delete_elem", tracked, key, value)
        if not taken and ctypes.get_errno() in UNSUPPORTED:
            taken = self._call("bpf_map_lookup_elem", tracked, key, value)
            taken = taken and self._call("bpf_map_delete_elem", tracked, key)
        if not taken and ctypes.get_errno() != errno.ENOENT:
            raise _refused("take from the map of connections")
        found["value"] = value
        return taken

    def events(self) -> dict[str, int]:
        """What the program did since it was loaded, by kind, over all CPUs.

        Raises:
            TrackerError: the kernel refuses it.
        """
        first = ctypes.c_uint32(0)
        counts = np.zeros((self._cpus, len(EVENT_KINDS)), np.uint64)
        if not self._call("bpf_map_lookup_elem", self._descriptors.events, first, counts):
            raise _refused("read the map of counters")
        return dict(zip(EVENT_KINDS, counts.sum(axis=0).tolist(), strict=True))

    def missed_events(self) -> int | None:
        """For how many events the kernel did not run the program; None: it does not count.

        It does not while another BPF program runs on the same CPU.

        Raises:
            TrackerError: the kernel refuses it.
        """
        if not self._counts_misses:
            return None
        info = np.zeros(64, np.uint64)
        size = ctypes.c_uint32(info.nbytes)
        if not self._call("bpf_obj_get_info_by_fd", self._descriptors.program, info, size):
            raise _refused("tell about the program")
        return int(info[RECURSION_MISSES_BYTES // info.itemsize])

    def _read_map(self, descriptor: int) -> Iterator[Records]:
        keys = np.empty(CHUNK, KEY)
        values = np.empty(CHUNK, VALUE)
        connections = np.empty(CHUNK, CONNECTION)
        position: ctypes.c_uint32 | None = None
        following = ctypes.c_uint32()
        finished = False
        while not finished:
            count = ctypes.c_uint32(CHUNK)
            if not self._call(
                "bpf_map_lookup_batch", descriptor, position, following, keys, values, count
            ):
                if ctypes.get_errno() != errno.ENOENT:
                    raise _refused("read the map of connections")
                finished = True
            position = ctypes.c_uint32(following.value)
            connections["key"][: count.value] = keys[: count.value]
            connections["value"][: count.value] = values[: count.value]
            yield connections[: count.value]

    def _call(self, function: str, descriptor: int, *arguments: Any) -> bool:
        """Whether a libbpf function succeeded; else ctypes.get_errno() says why."""
        passed = [_pointer(argument) for argument in arguments]
        if function.endswith("_batch"):
            passed.append(None)  # no options
        return bool(getattr(self._libbpf, function)(ctypes.c_int(descriptor), *passed) == 0)


def possible_cpus(ranges: str) -> int:
    """How many CPUs a per-CPU map has values for, from /sys/devices/system/cpu/possible.

    The file has ranges, ``0-3,8-11``, and a map has a value for each CPU up to
    the last (Documentation/admin-guide/cputopology.rst).
    """
    return sum(
        int(last or first) - int(first) + 1
        for first, _, last in (each.partition("-") for each in ranges.strip().split(","))
    )


def _pointer(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data_as(ctypes.c_void_p)
    return None if argument is None else ctypes.byref(argument)


def _refused(what: str) -> TrackerError:
    reason = os.strerror(ctypes.get_errno())
    return TrackerError(f"the kernel refuses to {what}: {reason}")
