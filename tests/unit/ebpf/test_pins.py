# SPDX-License-Identifier: GPL-3.0-only
"""Pinned objects with unexpected content are refused or harmless."""

from pathlib import Path

import numpy as np
import pytest

from tcpexporter.connections.record import CONNECTION, KEY
from tcpexporter.ebpf import pins
from tcpexporter.ebpf.pins import FIELDS, KEY_FIELDS, LAYOUT_MAGIC, LAYOUT_WORDS
from tcpexporter.errors import PinError

PATH = Path("/sys/fs/bpf/tcpexporter/1/layout")
OURS = [
    *(LAYOUT_MAGIC, CONNECTION.itemsize, KEY.itemsize),
    *pins._offsets(CONNECTION, FIELDS),
    *pins._offsets(KEY, KEY_FIELDS),
]


def record(**words: int) -> np.dtype[np.void]:
    """Return the dtype of our layout with some words changed; ``w3`` is the word 3."""
    said = np.zeros(LAYOUT_WORDS, np.uint32)
    said[: len(OURS)] = OURS
    for name, word in words.items():
        said[int(name[1:])] = word
    return pins._record(PATH, said)


def test_our_own_layout_is_accepted() -> None:
    """Each field has its own offset."""
    found = record()
    assert found.itemsize == CONNECTION.itemsize
    assert [found.fields[each][1] for each in FIELDS] == OURS[3:6]  # type: ignore[index]


@pytest.mark.parametrize(
    "words",
    [
        {"w0": LAYOUT_MAGIC + 1},
        {"w1": 0},
        {"w1": CONNECTION.itemsize - 8},
        {"w1": CONNECTION.itemsize + 4},
        {"w2": KEY.itemsize - 1},
        {"w2": 2**31 - 1},
        {"w2": 2**32 - 1},
        {"w3": CONNECTION.itemsize - 7},
        {"w3": 2**32 - 1},
        {"w4": 671088640, "w2": 2013265960},  # their sum has more than 32 bits
        {"w6": KEY.itemsize - 15},
    ],
)
def test_a_field_outside_of_its_record_is_refused(words: dict[str, int]) -> None:
    """numpy alone would read there, which would crash the process."""
    with pytest.raises(PinError, match="is not an object that an exporter has pinned"):
        record(**words)


@pytest.mark.parametrize(
    "fdinfo",
    [
        b"",
        b"max_entries:\n",
        b"max_entries:\tmany\n",
        b"\xff",
        b"max_entries:" + b"9" * 5003,
    ],
)
def test_an_object_with_missing_properties_is_refused(fdinfo: bytes) -> None:
    """The object is of another kind, or the kernel shows less of it."""
    with pytest.raises(PinError, match="is not an object that an exporter has pinned"):
        pins._number(PATH, pins._shown(fdinfo), "max_entries")
