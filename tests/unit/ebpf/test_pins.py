# SPDX-License-Identifier: GPL-3.0-only
"""Pinned objects with unexpected content are refused or harmless."""

from pathlib import Path

import pytest

from tcpexporter.ebpf import pins
from tcpexporter.errors import PinError

PATH = Path("/sys/fs/bpf/tcpexporter/1/layout")


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
