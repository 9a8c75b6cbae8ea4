# SPDX-License-Identifier: GPL-3.0-only
"""The protocols of sources and tables of connections, and a source in memory for tests."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import OutboundPort, Parts
from tcpexporter.connections.record import LISTENER, Records, Words
from tcpexporter.connections.series import Ledger

if TYPE_CHECKING:  # this package does not import tcpexporter.host at run time
    from tcpexporter.host.background import Task


INBOUND = Parts(OutboundPort.NONE, by_netns=False)
"""What is counted separately by default."""


@dataclass(frozen=True)
class Reconciliation:
    """Results of comparing the tracker with the socket tables since the start."""

    runs: int = 0
    missed_open: int = 0
    """Connections that were added because the event of their opening was missed."""
    missed_close: int = 0
    """Connections that were removed because the event of their closing was missed."""
    duration_s: float = 0.0
    """Duration of the last run, in seconds."""
    finished_s: float = 0.0
    """When the last run ended, in Unix time; 0: no run has ended yet."""
    interval_s: float = 0.0
    """Seconds from the last run to the next; a missed event causes an earlier run."""


@dataclass(frozen=True)
class Report:
    """State of a source, for metrics; None: the source does not have this value."""

    max_connections: int | None = None
    """The maximum number of connections that can be tracked."""
    kernel_events: Mapping[str, int] = field(default_factory=dict)
    """How often the BPF program took each action since it was loaded."""
    uncertain_connections: int | None = None
    """An upper bound of the difference between the exporter's counts and the kernel's."""
    kernel_series: int | None = None
    """Series numbers in use."""
    max_kernel_series: int | None = None
    """The maximum number of series numbers."""
    missed_events: int | None = None
    """Number of events for which the kernel skipped the BPF program."""
    seeded_connections: int | None = None
    """Number of tracked connections that no event of this run has reported."""
    refused_seeds: int | None = None
    """How often the tracker had no free slot for a connection that no event reported."""
    reconciliation: Reconciliation | None = None
    state_saved_s: float | None = None
    """When ages were last saved to a file, in Unix time; 0: not yet."""


class ConnectionTables(Protocol):
    """Tables of connections that are added to the tracker or compared with it.

    They are the kernel's socket tables, or the maps that a previous run has pinned.
    """

    def established(self, *, with_ages: bool) -> Records:
        """Read the established connections, of dtype `SOCKET`.

        Args:
            with_ages: whether to subtract the age of each connection from
                ``established_ns``, if the tables have ages.

        Raises:
            SourceError: the tables cannot be read.
        """
        ...

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """Return the inodes of the network namespaces that the tables cover."""
        ...


class Source(Protocol):
    """A source: it reports established connections and listening ports."""

    name: str
    """The value of ``--source`` that selects this source."""

    def start(self) -> None:
        """Read the pre-existing connections, and start the threads.

        Raises:
            SourceError: the connections cannot be read.
            ThreadError: the kernel refuses another thread.
        """
        ...

    def tasks(self) -> "Sequence[Task]":
        """Return the background tasks, whose threads must keep running."""
        ...

    def close(self) -> None:
        """End the threads, and close all descriptors."""
        ...

    def read(self) -> Iterator[Chunk]:
        """Yield all slots, in chunks; those without a connection too.

        A chunk is valid until the next one is requested. So a source requires no copy of
        its slots. The reader (`slot_counts`) keeps the words and clients of all slots.

        Raises:
            SourceError: the connections cannot be read now.
        """
        ...

    def records(self) -> Iterator[tuple[Records, Words]]:
        """Yield the records and words of the same slots, in chunks, as `read` does.

        The records have the fields ``key`` and ``is_outbound``.

        Raises:
            SourceError: the connections cannot be read now.
        """
        ...

    def ledger(self) -> Ledger:
        """Return what has happened in each series.

        The result has every series of the chunks that `read` has returned before.

        Raises:
            SourceError: it cannot be read now.
        """
        ...

    def forget(self, field: str, values: Iterable[int]) -> None:
        """Forget counters of series without connections; any thread may call this.

        Args:
            field: ``netns`` or ``cgroup``.
            values: the values of this field in the series to forget.
        """
        ...

    def listeners(self) -> Records:
        """Read the listening ports, of dtype `LISTENER`.

        Raises:
            SourceError: the listening ports cannot be read now.
        """
        ...

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """Return the inodes of the network namespaces that the source holds open.

        While a namespace is held open, no other namespace can have its inode. The first
        one is the namespace of --netns, or that of the exporter. Any thread may call this.
        """
        ...

    def report(self) -> Report:
        """Return the state of the source.

        Raises:
            SourceError: the kernel refuses to report a value.
        """
        ...


class MemorySource:
    """A source that returns the connections that a test has given to it."""

    def __init__(
        self,
        chunks: Sequence[Records] = (),
        *,
        listeners: Records | None = None,
        report: Report | None = None,
        name: str = "memory",
        parts: Parts = INBOUND,
        bounds_s: Sequence[float] = (),
    ) -> None:
        """Use connections of dtype `SOCKET`, which `read` and `records` yield."""
        self.name = name
        self.chunks = list(chunks)
        self.counted = MemoryLedger(parts, bounds_s)
        """The ledger; a test may change it."""
        self._listeners = np.empty(0, LISTENER) if listeners is None else listeners
        self._report = report or Report()

    def start(self) -> None:
        pass

    def tasks(self) -> "Sequence[Task]":
        return ()

    def close(self) -> None:
        pass

    def read(self) -> Iterator[Chunk]:
        yield from map(self.counted.count, self.chunks)

    def records(self) -> Iterator[tuple[Records, Words]]:
        for each in self.chunks:
            yield each, self.counted.count(each).words

    def ledger(self) -> Ledger:
        return self.counted.snapshot()

    def forget(self, field: str, values: Iterable[int]) -> None:
        self.counted.forget(field, values)

    def listeners(self) -> Records:
        return self._listeners

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.empty(0, np.uint32)

    def report(self) -> Report:
        return self._report
