# SPDX-License-Identifier: GPL-3.0-only
"""Waits for runs of the BPF program, and turns the caches of the program off and on."""

import contextlib
from collections.abc import Iterator

import numpy as np

from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import FIRST, Map, map_errors

OFF = 1 << 32
"""The epoch in which the program uses no cache: an element has only 32 bits for it."""


class Runs:
    """The runs of a loaded program. Only one thread may call the methods."""

    def __init__(self, descriptors: Descriptors) -> None:
        """Begin an epoch. There must be only one object for a loaded program.

        Until now the program has used its caches in epoch 0, in which nothing is deleted.

        Args:
            descriptors: of the program and its maps, which stay open.

        Raises:
            TrackerError: the kernel refuses to map the epoch.
        """
        self._barrier = Map(descriptors.barrier, "barrier")
        self._events = np.uint32(descriptors.events)
        with map_errors():
            epochs = MappedArray(descriptors.epochs, np.dtype(np.uint64), 1, 1)
            self._epochs = epochs.upto(1)
        self._last_epoch = 0
        self._begin_epoch()

    @map_errors()
    def wait(self) -> None:
        """Wait until every run of the program that has begun has ended.

        After each change to a map of maps, the kernel waits for that by synchronize_rcu():
        Linux kernel commit 1ae80cf31938 ("bpf: wait for running BPF programs when updating
        map-in-map") (in v4.20). So every softirq that has begun has ended too, and has
        stored the state of the socket that it reported or missed.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        self._barrier.put(FIRST, self._events)

    @contextlib.contextmanager
    def without_caches(self) -> Iterator[None]:
        """Turn the caches off during the block: case 16 of `memory_order`.

        The block deletes keys from a map of which the program has a cache, then calls
        `wait`, and frees what belonged to these keys. If it raises an error, the caches
        stay off until the end of the next block; this only makes the program slower.
        """
        self._epochs[0] = OFF
        yield
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Turn the caches on; all that they have is invalid."""
        self._last_epoch += 1
        self._epochs[0] = self._last_epoch
