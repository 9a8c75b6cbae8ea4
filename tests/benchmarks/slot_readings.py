# SPDX-License-Identifier: GPL-3.0-only
"""Times the part of a scrape that depends on the number of connections, without a kernel.

The slots are an array of this process. So the figures show what a scrape costs if
connections change between scrapes, which the held sockets of other figures do not.
"""

import time
from collections.abc import Iterator

import numpy as np

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.identity import CLIENT_BITS
from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import words
from tcpexporter.connections.slot_counts import SlotCounts
from tests.benchmarks.hold import PORTS

SLOTS = 1_000_000
CHANGED = 1_000
"""Connections that close, and as many that open, between two scrapes."""

READINGS = 11
SINCE_NS = 1 << TIME_SHIFT
"""All connections are older: they are long-term."""


def readings() -> Iterator[tuple[str, float]]:
    """Yield names of figures, and the seconds of CPU time of a reading."""
    random = np.random.default_rng(20)
    numbers = random.integers(1, len(PORTS) + 1, SLOTS, np.uint32)
    slots = words(numbers, np.zeros(SLOTS, np.uint64))
    clients = random.integers(0, 1 << CLIENT_BITS, SLOTS, np.uint64)
    chunk = Chunk(slots, clients)
    counts = SlotCounts()
    for _ in range(READINGS):
        yield "reading_first_s", _read_s(SlotCounts(), chunk)
    _read_s(counts, chunk)
    for _ in range(READINGS):
        yield "reading_unchanged_s", _read_s(counts, chunk)
        closed = random.choice(SLOTS, CHANGED, replace=False)
        clients[closed] = random.integers(0, 1 << CLIENT_BITS, CHANGED, np.uint64)
        yield "reading_changed_s", _read_s(counts, chunk)


def _read_s(counts: SlotCounts, chunk: Chunk) -> float:
    began_s = time.process_time()
    counts.read([chunk], [SINCE_NS], long_term_ns=SINCE_NS)
    return time.process_time() - began_s
