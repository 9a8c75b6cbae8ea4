# SPDX-License-Identifier: GPL-3.0-only
"""Lets the BPF program record which connections close, while seeds are added."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from tcpexporter.connections.identity import Hashes
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.maps import FIRST, Map, map_errors


class ClosingsLog:
    """The closings log: the handles of closed connections, as those of seeds."""

    def __init__(self, descriptors: Descriptors, wait_for_runs: Callable[[], None]) -> None:
        """Use the maps of a loaded program.

        Args:
            descriptors: of the program and its maps, which stay open.
            wait_for_runs: waits until every run of the program that has begun has ended.
        """
        self._map = Map(descriptors.closings, "closings")
        self._recording = Map(descriptors.recording, "recording")
        self._wait_for_runs = wait_for_runs
        self._has_recorded = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Let the program record all closings during the block.

        When the block begins, every run that does not record has ended, and every run that
        recorded in an earlier block. Waiting for the latter now keeps the start short.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if self._has_recorded:
            self._wait_for_runs()
        self._has_recorded = True
        self.pop()
        self._record(True)
        try:
            self._wait_for_runs()
            yield
        finally:
            self._record(False)

    @map_errors()
    def pop(self) -> Hashes:
        """Return the handles of the closings that were recorded, and delete them.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        handles, _ = self._map.items(np.uint64, np.uint32, delete=True)
        return handles

    @map_errors()
    def _record(self, is_recording: bool) -> None:
        self._recording.put(FIRST, np.uint32(is_recording))
