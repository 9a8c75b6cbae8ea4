# SPDX-License-Identifier: GPL-3.0-only
"""The number of values of a per-CPU map is computed from the ranges of possible CPUs."""

import os

import pytest

from tcpexporter.ebpf.maps import cpus_in, possible_cpus


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
def test_cpus_of_all_ranges_are_counted(ranges: str, expected: int) -> None:
    """A per-CPU map has a value for each possible CPU, and none for gaps."""
    assert cpus_in(ranges) == expected


def test_the_file_of_this_kernel_is_parsed() -> None:
    """It has at least as many CPUs as are in use."""
    possible = possible_cpus()
    assert possible >= (os.cpu_count() or 1)
