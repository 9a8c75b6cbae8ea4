# SPDX-License-Identifier: GPL-3.0-only
"""The calculated memory of large machines is that of the code, and of the kernel."""

import os
from pathlib import Path

import pytest

from tcpexporter.connections.series import bucket_count
from tcpexporter.ebpf import loading
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.maps import possible_cpus
from tests import tables
from tests.benchmarks.kernel import maps
from tests.benchmarks.large_machines import (
    BEGIN,
    CPUS,
    END,
    RECENT_SLOTS,
    WORD_BYTES,
    Sizes,
    table,
)

DOCUMENT = Path(__file__).parents[2] / "docs/performance.md"

HEADER_BYTES = 1024
"""The struct of a map is smaller, and differs between kernels."""

EXACT_SINCE = 6, 4
"""Linux 6.4 reports what a map uses, older kernels the size of its entries."""

NO_NETNS = 1
"""An inode that no network namespace has."""


def test_the_table_is_current() -> None:
    """`make documents` would not change it."""
    document = DOCUMENT.read_text()
    assert tables.replaced(document, BEGIN, END, tables.markdown(table())) == document


@pytest.mark.skipif(os.geteuid() != 0, reason="loading a BPF program requires root")
@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < EXACT_SINCE,
    reason="the kernel does not report what maps use",
)
@pytest.mark.parametrize("bounds", [(), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_the_kernel_reports_the_calculated_sizes(bounds: tuple[int, ...]) -> None:
    """Of each map that is not small, on the CPUs of this machine.

    The program observes no network namespace: connections of other processes would
    allocate elements of the hash maps meanwhile.
    """
    cpus = possible_cpus()
    masks = ((1, 1), (1, 1))
    descriptors = loading.load(
        Request(300_000, NO_NETNS, (1, 2), client_masks=masks, lifetime_bounds=bounds)
    )
    try:
        sizes = Sizes(300_000, bucket_count(bounds), cpus).maps
        # The exporter has no descriptor of this map; its program has it.
        (recent_slots,) = (
            each.memlock
            for each in maps(os.getpid())
            if (each.max_entries, each.value_size) == (RECENT_SLOTS, WORD_BYTES)
        )
        for name, size in sizes.items():
            if name == "recent_slots":
                used = recent_slots
            else:
                shown = Path(f"/proc/self/fdinfo/{getattr(descriptors, name)}").read_text()
                fields = dict(line.split(":") for line in shown.splitlines())
                used = int(fields["memlock"])
            assert 0 <= used - size <= HEADER_BYTES, name
    finally:
        descriptors.close()


def test_only_a_small_part_depends_on_the_number_of_cpus() -> None:
    """No map has an entry for each connection or series and CPU."""
    many, few = (Sizes(262_144, 9, cpus) for cpus in (CPUS, 2))
    assert many.per_cpu - few.per_cpu < 10 << 20
    assert many.at_start - few.at_start < 1 << 20
