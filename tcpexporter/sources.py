# SPDX-License-Identifier: GPL-3.0-only
"""The seam between where connections are known from and what is made of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from tcpexporter.connections import LISTENER, Records


class Source(Protocol):
    """Where the connections come from."""

    name: str
    """As ``--source`` has it."""

    def start(self) -> None:
        """Learn of the connections that are there already.

        Raises:
            SourceError: they cannot be read.
        """
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

    def kernel_events(self) -> Mapping[str, int]:
        """What the BPF program did since it was loaded, by action; empty without one."""
        ...

    @property
    def max_connections(self) -> int | None:
        """How many connections fit, None where nothing bounds them."""
        ...


class MemorySource:
    """A source that says what it was given: the fake behind which all else is tested."""

    def __init__(
        self,
        chunks: Sequence[Records] = (),
        *,
        listeners: Records | None = None,
        kernel_events: Mapping[str, int] | None = None,
        max_connections: int | None = None,
        name: str = "memory",
    ) -> None:
        self.name = name
        self.chunks = list(chunks)
        self.max_connections = max_connections
        self._listeners = np.empty(0, LISTENER) if listeners is None else listeners
        self._kernel_events = dict(kernel_events or {})

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self) -> Iterator[Records]:
        yield from self.chunks

    def listeners(self) -> Records:
        return self._listeners

    def kernel_events(self) -> Mapping[str, int]:
        return self._kernel_events
