# SPDX-License-Identifier: GPL-3.0-only
"""Protocols of what reports connections, and a source in memory for tests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import LISTENER, Records

if TYPE_CHECKING:  # this package imports nothing of the host at run time
    from tcpexporter.host.background import Task


@dataclass(frozen=True)
class Reconciliation:
    """What comparing with the socket tables has come to."""

    runs: int = 0
    missed_open: int = 0
    """Connections that were added because the kernel's word of them was missed."""
    missed_close: int = 0
    """Connections that were removed for the same reason."""
    duration_s: float = 0.0
    """Of the last run."""
    finished_s: float = 0.0
    """When the last run ended, by the wall clock; 0: there was none."""
    interval_s: float = 0.0
    """Until the next run, unless there is a reason for one before."""


@dataclass(frozen=True)
class Report:
    """What a source tells of itself; None is what it does not know."""

    max_connections: int | None = None
    """How many connections fit."""
    kernel_events: Mapping[str, int] = field(default_factory=dict)
    """What the BPF program did since it was loaded, by action."""
    missed_events: int | None = None
    """How many events the kernel did not run the program for."""
    seeded_connections: int | None = None
    """Of those read last, how many are older than this run, or were missed."""
    refused_seeds: int | None = None
    """For how many found in the socket tables there was no room, at each attempt."""
    reconciliation: Reconciliation | None = None
    state_saved_s: float | None = None
    """When ages were last saved in a file, by the wall clock; 0: not yet."""


class ConnectionTables(Protocol):
    """Tables of connections, which the tracker is filled from or compared with.

    They are the kernel's socket tables, or the maps that a previous run has pinned.
    """

    def established(self, *, with_ages: bool) -> Records:
        """Reads the established connections, of dtype `SOCKET`.

        Args:
            with_ages: whether ``established_ns`` takes the age of a connection into
                account, if the tables have it.

        Raises:
            SourceError: the tables cannot be read.
        """
        ...

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """Returns the inodes of the network namespaces that the tables cover."""
        ...


class Source(Protocol):
    """Where the connections come from."""

    name: str
    """As ``--source`` has it."""

    def start(self) -> None:
        """Learn of the connections that are there already.

        Raises:
            SourceError: they cannot be read.
            ThreadError: there can be no thread.
        """
        ...

    def tasks(self) -> "Sequence[Task]":
        """The threads that have been started and have to go on."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...

    def read(self) -> Iterator[Records]:
        """Every connection that is established now, in chunks of dtype `CONNECTION`.

        A chunk is valid until the next one is asked for: memory stays constant
        however many connections there are.

        Raises:
            SourceError: they cannot be read now.
        """
        ...

    def listeners(self) -> Records:
        """Every port that is listened on now, of dtype `LISTENER`.

        Raises:
            SourceError: they cannot be read now.
        """
        ...

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """The inodes of the network namespaces that it holds, from any thread.

        No other namespace gets them meanwhile. The first is that of --netns, or our own.
        """
        ...

    def report(self) -> Report:
        """What there is to know about the source itself.

        Raises:
            SourceError: the kernel refuses to tell.
        """
        ...


class MemorySource:
    """A source that says what it was given: the fake behind which all else is tested."""

    def __init__(
        self,
        chunks: Sequence[Records] = (),
        *,
        listeners: Records | None = None,
        report: Report | None = None,
        name: str = "memory",
    ) -> None:
        self.name = name
        self.chunks = list(chunks)
        self._listeners = np.empty(0, LISTENER) if listeners is None else listeners
        self._report = report or Report()

    def start(self) -> None:
        pass

    def tasks(self) -> "Sequence[Task]":
        return ()

    def close(self) -> None:
        pass

    def read(self) -> Iterator[Records]:
        yield from self.chunks

    def listeners(self) -> Records:
        return self._listeners

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.empty(0, np.uint32)

    def report(self) -> Report:
        return self._report
