# SPDX-License-Identifier: GPL-3.0-only
"""An exporter whose sixth collection never ends: it reads a pipe that stays empty."""

import itertools
import os
from collections.abc import Iterator

from tcpexporter.__main__ import main
from tcpexporter.connections.clients import Chunk
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.socket_tables.polling import PollingSource

COLLECTIONS = 5

end, _never_closed = os.pipe()
collections = itertools.count()


def hang_in(source: type[EbpfSource | PollingSource]) -> None:
    read = source.read

    def read_or_hang(self: EbpfSource | PollingSource) -> Iterator[Chunk]:
        if next(collections) >= COLLECTIONS:
            os.read(end, 1)
        return read(self)  # type: ignore[arg-type]  # self is of that source

    source.read = read_or_hang  # type: ignore[method-assign]


if __name__ == "__main__":
    hang_in(EbpfSource)
    hang_in(PollingSource)
    main()
