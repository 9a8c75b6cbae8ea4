# SPDX-License-Identifier: GPL-3.0-only
"""Lets the BPF program record which connections close, while seeds are added."""

import contextlib
from collections.abc import Iterator

import numpy as np

from tcpexporter.connections.identity import Hashes
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.maps import FIRST, Map, map_errors
from tcpexporter.ebpf.runs import Runs


class ClosingsLog:
    """The closings log: the handles of closed connections, as those of seeds."""

    def __init__(self, descriptors: Descriptors, runs: Runs) -> None:
        """Use the maps of a loaded program.

        Args:
            descriptors: of the program and its maps, which stay open.
            runs: the runs of the program.
        """
        self._map = Map(descriptors.closings, "closings")
        self._recording = Map(descriptors.recording, "recording")
        self._runs = runs
        self._has_recorded = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Let the program record all closings during the block.

        When the block begins, every run that does not record has ended. A run that began in
        an earlier block may add to the log after that block. This method waits for such
        runs when the next block begins, because a start has only one block.

        Raises:
            TrackerError: the kernel refuses a map operation.
        """
        if self._has_recorded:
            self._runs.wait()
        self._has_recorded = True
        self.pop()
        self._record(True)
        try:
            self._runs.wait()
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
