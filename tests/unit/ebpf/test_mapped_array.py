# SPDX-License-Identifier: GPL-3.0-only
"""Arrays are mapped in whole pages, whatever the size of a page is."""

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from tcpexporter.connections.record import CONNECTION
from tcpexporter.ebpf import connection_array, series_numbers
from tcpexporter.ebpf.mapped_array import MappedArray, map_entries
from tcpexporter.host import libc

KIB = 1024

PAGES = [each for each in (4 * KIB, 16 * KIB, 64 * KIB) if each % mmap.PAGESIZE == 0]
"""The sizes of pages that arm64 can have, except those smaller than this machine's."""

WORDS = connection_array.WINDOW


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set and return the page size. Mapping parts of pages fails, as in the kernel."""
    page: int = request.param
    original = libc.mmap

    def checked(address: int | None, size: int, *how: int) -> int:
        offset = how[3] if len(how) > 2 else 0
        assert size % page == 0
        assert offset % page == 0
        return original(address, size, *how)

    monkeypatch.setattr(mmap, "PAGESIZE", page)
    monkeypatch.setattr(libc, "mmap", checked)
    return page


Map = tuple[int, npt.NDArray[np.uint64]]


def array_map(page: int, entry_bytes: int, entries: int) -> Map:
    """Return the descriptor of a file that replaces an array map, and its content."""
    descriptor = os.memfd_create("map")
    size = entries * entry_bytes
    os.ftruncate(descriptor, -(-size // page) * page)
    content = np.arange(size // 8, dtype=np.uint64)
    os.pwrite(descriptor, content.tobytes(), 0)
    return descriptor, content


@pytest.fixture
def descriptors() -> Iterator[list[int]]:
    opened: list[int] = []
    yield opened
    for each in opened:
        os.close(each)


@pytest.mark.parametrize(
    "entry_bytes", [16, 24, 56, 72, 88, 104], ids=lambda each: f"{each}-bytes"
)
def test_windows_of_the_ledger_are_whole_pages(
    page: int, descriptors: list[int], entry_bytes: int
) -> None:
    """The size of an entry of the ledger depends on the number of lifetime buckets."""
    window = series_numbers._window(entry_bytes)
    assert_readable(page, descriptors, entry_bytes, window)


@pytest.mark.parametrize("entry_bytes", [8, CONNECTION.itemsize])
def test_windows_of_connections_are_whole_pages(
    page: int, descriptors: list[int], entry_bytes: int
) -> None:
    """Words and records have a window of a fixed number of slots."""
    assert_readable(page, descriptors, entry_bytes, WORDS)


def assert_readable(
    page: int, descriptors: list[int], entry_bytes: int, window: int
) -> None:
    """Check the entries of three windows, the last of which is not full."""
    entries = 2 * window + 13
    descriptor, content = array_map(page, entry_bytes, entries)
    descriptors.append(descriptor)
    entry = np.dtype([("values", "u8", (entry_bytes // 8,))])
    array = MappedArray(descriptor, entry, entries, window)
    for upto in (1, window + 1, entries):
        found = array.upto(upto)
        assert len(found) >= upto
        values = found.view(np.uint64)
        assert (values == content[: values.size]).all()


def test_the_records_of_some_windows_are_mapped_alone(
    page: int, descriptors: list[int]
) -> None:
    """Each chunk begins with the first slot of a window."""
    entries = 2 * WORDS + 13
    descriptor, content = array_map(page, CONNECTION.itemsize, entries)
    descriptors.append(descriptor)
    for first, last in ((0, WORDS), (WORDS, 2 * WORDS), (2 * WORDS, entries)):
        found = map_entries(descriptor, CONNECTION, first, last).view(np.uint64)
        start = first * CONNECTION.itemsize // 8
        assert (found == content[start : start + found.size]).all()


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes that are unmapped from now on."""
    sizes: list[int] = []
    original = libc.munmap

    def recorded(address: int, size: int) -> None:
        sizes.append(size)
        original(address, size)

    monkeypatch.setattr(libc, "munmap", recorded)
    return sizes


def test_an_array_is_unmapped_when_nothing_refers_to_it(
    page: int, descriptors: list[int], unmapped: list[int]
) -> None:
    """A part of the array keeps it mapped."""
    descriptor, content = array_map(page, 8, WORDS)
    descriptors.append(descriptor)
    array = MappedArray(descriptor, np.dtype("u8"), WORDS, WORDS)
    entries = map_entries(descriptor, np.dtype("u8"), 0, WORDS)
    part, other_part = array.upto(WORDS)[-3:], entries[-3:]
    del array, entries
    gc.collect()
    assert unmapped == []
    assert part.tolist() == other_part.tolist() == content[WORDS - 3 : WORDS].tolist()
    del part, other_part
    gc.collect()
    assert unmapped == [WORDS * 8] * 2


ENDS_WITH_ARRAYS = """
import os
import numpy as np
from tcpexporter.ebpf.mapped_array import MappedArray, map_entries
from tcpexporter.host import libc
libc.munmap = lambda address, size: os.write(1, b"unmapped")
descriptor = os.memfd_create("map")
os.ftruncate(descriptor, 65536)
entries = MappedArray(descriptor, np.dtype("u8"), 8192, 8192).upto(8192)
others = map_entries(descriptor, np.dtype("u8"), 0, 8192)
"""


def test_arrays_stay_mapped_until_the_process_has_ended() -> None:
    """A background thread may read them while the interpreter exits."""
    command = (sys.executable, "-c", ENDS_WITH_ARRAYS)
    assert subprocess.check_output(command, text=True) == ""
