# SPDX-License-Identifier: GPL-3.0-only
"""The number of values of a per-CPU map is computed from the ranges of possible CPUs."""

import os
from pathlib import Path

import pytest

from tcpexporter.ebpf.maps import possible_cpus


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ("0", 1),
        ("0\n", 1),
        ("0-1\n", 2),
        ("0-127\n", 128),
        ("0,2\n", 2),
        ("0-3,8-11\n", 8),
        ("0,2-4,7,10-12\n", 8),
    ],
)
def test_cpus_are_those_of_all_ranges(ranges: str, expected: int) -> None:
    """A per-CPU map has a value for each possible CPU, none for the numbers between."""
    assert possible_cpus(ranges) == expected


def test_this_machine_has_as_many_cpus_as_it_says() -> None:
    """The kernel's own file is understood; there may be more CPUs than are in use."""
    possible = possible_cpus(Path("/sys/devices/system/cpu/possible").read_text())
    assert possible >= (os.cpu_count() or 1)
