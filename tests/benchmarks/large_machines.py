# SPDX-License-Identifier: GPL-3.0-only
"""Calculates the memory for large machines, from the sizes in the code.

    python -m tests.benchmarks.large_machines --write docs/performance.md

It replaces all text between two marker lines, so do not edit that text. The formulas are
those of the kernel's ``map_mem_usage`` functions; test_large_machines.py compares them with
what the running kernel reports.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from tcpexporter.config.settings import Settings
from tcpexporter.connections.parts import SERIES_FIRST
from tcpexporter.connections.record import CONNECTION
from tcpexporter.connections.series import (
    SERIES,
    bucket_count,
    correction_dtype,
    entry_dtype,
)
from tcpexporter.ebpf.event_counters import EVENT_KINDS
from tcpexporter.ebpf.loader import MAX_CLOSINGS
from tcpexporter.ebpf.loader_protocol import MAX_SERIES
from tests import tables
from tests.benchmarks.number_format import format_bytes
from tests.tables import Table

BEGIN = "<!-- large machines: written by python -m tests.benchmarks.large_machines -->"
END = "<!-- end of large machines -->"

CPUS = 256
CONNECTIONS = (262_144, 2_000_000, 16_000_000)

PAGE_BYTES = 4096
WORD_BYTES = 8
NUMBER_BYTES = 4
HANDLE_BYTES = 8

RECENT_SLOTS = 1 << 16
"""``1 << RECENT_SLOTS_BITS`` in bpf/tcp_tracker.c."""

BUCKET_BYTES = 16
"""``struct bucket`` of a hash map, in the kernel's kernel/bpf/hashtab.c."""

ELEMENT_BYTES = 48 + 8
"""``struct htab_elem`` without key and value, and the pointer of its allocator."""

CACHED_ELEMENTS = 96
"""The most free elements that the allocator of a hash map keeps for each CPU:
high_watermark in the kernel's kernel/bpf/memalloc.c."""


@dataclass(frozen=True)
class Sizes:
    """Memory of the BPF maps, in bytes."""

    max_connections: int
    buckets: int
    """Lifetime buckets; 0: without --histograms."""
    cpus: int = CPUS
    """Possible CPUs."""

    @property
    def arrays(self) -> dict[str, int]:
        """The mapped arrays: bytes of their entries, in whole pages."""
        series = SERIES_FIRST + MAX_SERIES
        return {
            "connections": _pages(self.max_connections * CONNECTION.itemsize),
            "series_and_time": _pages(self.max_connections * WORD_BYTES),
            "clients": _pages(self.max_connections * WORD_BYTES),
            "ledger": _pages(series * entry_dtype(self.buckets).itemsize),
            "corrections": _pages(series * correction_dtype(self.buckets).itemsize),
        }

    @property
    def maps(self) -> dict[str, int]:
        """Each map that is not small, without hash map elements and without headers."""
        return {
            **{name: PAGE_BYTES + size for name, size in self.arrays.items()},
            "slots": _hash(self.max_connections),
            "series_numbers": _hash(MAX_SERIES),
            "closings": _hash(MAX_CLOSINGS),
            "free_slots": (self.max_connections + 1) * NUMBER_BYTES,
            "free_series": (MAX_SERIES + 1) * NUMBER_BYTES,
            "recent_slots": RECENT_SLOTS * WORD_BYTES,
            "events": self.cpus * len(EVENT_KINDS) * WORD_BYTES,
        }

    @property
    def at_start(self) -> int:
        return sum(self.maps.values())

    @property
    def full(self) -> int:
        """With as many connections, series and recorded closings as there can be."""
        return (
            self.at_start
            + self.max_connections * _element(HANDLE_BYTES)
            + MAX_SERIES * _element(SERIES.itemsize)
            + MAX_CLOSINGS * _element(HANDLE_BYTES)
            + self._cached
        )

    @property
    def per_cpu(self) -> int:
        """The part that depends on the number of CPUs, at most."""
        return self.maps["events"] + self._cached

    @property
    def _cached(self) -> int:
        """Free elements of the three hash maps."""
        of_each = 2 * _element(HANDLE_BYTES) + _element(SERIES.itemsize)
        return self.cpus * CACHED_ELEMENTS * of_each

    @property
    def reserved(self) -> int:
        """Addresses that the exporter reserves: those of the arrays that stay mapped."""
        return sum(self.arrays.values()) - self.records

    @property
    def records(self) -> int:
        """Addresses of the records, which are mapped only while they are read."""
        return self.arrays["connections"]


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _hash(entries: int) -> int:
    """Return the size of an empty hash map: its buckets, a power of two."""
    return BUCKET_BYTES * (1 << (entries - 1).bit_length())


def _element(key_bytes: int) -> int:
    """Return the size of an element of a hash map; the value is a number, in 8 bytes."""
    return ELEMENT_BYTES + key_bytes + WORD_BYTES


def table() -> Table:
    """Return a row for each number of connections, with and without --histograms."""
    rows = [
        [
            "`--max-connections`",
            "`--histograms`",
            "kernel memory at the start",
            "… at most, with full maps",
            "… of that, in proportion to the CPUs",
            "reserved addresses of the process",
            "… more while it reads all records",
        ]
    ]
    for connections in CONNECTIONS:
        for buckets in (0, bucket_count(Settings().buckets)):
            sizes = Sizes(connections, buckets)
            numbers = (
                sizes.at_start,
                sizes.full,
                sizes.per_cpu,
                sizes.reserved,
                sizes.records,
            )
            has_histograms = "yes" if buckets else "no"
            rows.append([f"{connections:,}", has_histograms, *map(format_bytes, numbers)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", type=Path, help="replace the text between the marker lines of this file"
    )
    arguments = parser.parse_args()
    text = tables.markdown(table())
    if arguments.write:
        tables.replace(arguments.write, BEGIN, END, text)
    else:
        sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
