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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tcpexporter.connections import CONNECTION, KEY, VALUE, Records
from tcpexporter.errors import TrackerError
from tcpexporter.libbpf import load_libbpf
from tcpexporter.loader import Loaded

CHUNK = 4096
"""Entries that are copied out of a map by one system call."""

EVENT_KINDS = ("inserted", "removed", "refused")
"""``struct tracker_events``, in its order."""


class Tracker:
    """The connections that the BPF program tracks, and the seeds beside them."""

    def __init__(self, loaded: Loaded) -> None:
        self.knows_netns = loaded.knows_netns
        self._descriptors = loaded.descriptors
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
        yield from self.tracked()
        yield from self.seeded()

    def tracked(self) -> Iterator[Records]:
        """The connections that the tracepoint told of, as `read` gives them."""
        return self._read_map(self._descriptors.tracked)

    def seeded(self) -> Iterator[Records]:
        """The connections that were found in the socket tables, as `read` gives them."""
        return self._read_map(self._descriptors.seeded)

    def add_seeds(self, seeds: Records) -> int:
        """Add connections of dtype `CONNECTION`; returns how many found no room.

        Raises:
            TrackerError: the kernel refuses it.
        """
        keys = np.ascontiguousarray(seeds["key"])
        values = np.ascontiguousarray(seeds["value"])
        count = ctypes.c_uint32(len(seeds))
        if not len(seeds):
            return 0
        if self._call(
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
