# SPDX-License-Identifier: GPL-3.0-only
"""Describes pinned maps, so that the next run, of any version, can read them."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.parts import TIME_SHIFT
from tcpexporter.connections.record import CONNECTION, KEY, SERIES_BITS
from tcpexporter.connections.series import bucket_count, entry_dtype
from tcpexporter.ebpf.loader_protocol import Request

LAYOUT_WORDS = 16
"""Words of 32 bits in a layout: the magic number, the size of a record, the size of its
key, and the offsets of the fields in the order of `FIELDS` and `KEY_FIELDS`. With `MAGIC`
also: `WORD_FORMAT`, the size of an entry of the ledger, `checksum`, and the offset of the
cgroup in a record, or 0 if it is not recorded. The rest is 0."""

MAGIC = 0x74637079
OLD_MAGIC = 0x74637078
"""The magic number of layouts of the versions without a ledger."""

FIELDS = ("key", "is_outbound")
"""The fields of `CONNECTION` that the next run adopts, besides ``cgroup``."""

OLD_FIELDS = ("established_ns", "key", "group")
OLD_FORMATS = {"established_ns": "u8", "group": "u4"}
"""The fields of a record with `OLD_MAGIC`, and their formats except that of the key."""

KEY_FIELDS = ("local_address", "remote_address", "netns", "local_port", "remote_port")
"""The fields of `KEY`. Their order is part of the layout and must not change."""

WORD_FORMAT = SERIES_BITS << 8 | TIME_SHIFT
"""How a word is divided into number and time."""

_FORMAT_AT = 3 + len(FIELDS) + len(KEY_FIELDS)


class Layout(NamedTuple):
    """What a previous run has pinned."""

    record: np.dtype[Any]
    """The adopted fields of a record, at the offsets of the version that pinned it."""
    is_old: bool
    """Whether the time and the direction are in the record, because there are no words."""
    is_continued: bool
    """Whether the run counted the same series, so that its ledger can be adopted."""


def make(request: Request) -> npt.NDArray[np.uint32]:
    """Return the layout of this version, in `LAYOUT_WORDS` words, for this request."""
    words = np.zeros(LAYOUT_WORDS, np.uint32)
    values = [MAGIC, CONNECTION.itemsize, KEY.itemsize, *_offsets(CONNECTION, FIELDS)]
    values += _offsets(KEY, KEY_FIELDS)
    values += [WORD_FORMAT, _entry(request).itemsize, checksum(request)]
    values += _offsets(CONNECTION, ("cgroup",)) if request.by_cgroup else [0]
    words[: len(values)] = values
    return words


def read(words: npt.NDArray[np.uint32], request: Request) -> Layout:
    """Parse a layout.

    Args:
        words: the layout.
        request: the one that the program of this run was loaded for.

    Raises:
        ValueError: this is not a layout, or it has fields outside of the record.
    """
    magic, record_bytes, key_bytes, *offsets = words.tolist()
    # The C struct has members of 64 bits, so its size is a multiple of 8 bytes. So is the
    # distance between elements: array_map_alloc in the kernel's kernel/bpf/arraymap.c.
    if magic not in (MAGIC, OLD_MAGIC) or record_bytes % 8:
        raise ValueError(magic)
    key_formats = {name: KEY[name] for name in KEY_FIELDS}
    fields = OLD_FIELDS if magic == OLD_MAGIC else FIELDS
    key = _laid_out(key_formats, offsets[len(fields) :], key_bytes)
    if magic == OLD_MAGIC:
        formats = {name: OLD_FORMATS.get(name, key) for name in OLD_FIELDS}
        record = _laid_out(formats, offsets, record_bytes)
        return Layout(record, is_old=True, is_continued=False)
    found = words[_FORMAT_AT:]
    if found[0] != WORD_FORMAT:
        raise ValueError(int(found[0]))
    formats = {name: key if name == "key" else CONNECTION[name] for name in FIELDS}
    offsets = offsets[: len(FIELDS)]
    if found[3]:
        formats["cgroup"] = CONNECTION["cgroup"]
        offsets.append(int(found[3]))
    expected = [_entry(request).itemsize, checksum(request)]
    return Layout(
        _laid_out(formats, offsets, record_bytes),
        is_old=False,
        is_continued=found[1:3].tolist() == expected,
    )


def checksum(request: Request) -> int:
    """Return a number that is equal for programs that count the same series."""
    compared = (
        request.netns,
        request.by_netns,
        request.by_cgroup,
        int(request.outbound_port),
        request.lifetime_bounds,
    )
    return zlib.crc32(repr(compared).encode())


def _entry(request: Request) -> np.dtype[Any]:
    return entry_dtype(bucket_count(request.lifetime_bounds))


def _offsets(dtype: np.dtype[Any], names: tuple[str, ...]) -> list[int]:
    fields: Mapping[str, tuple[Any, ...]] = dtype.fields or {}
    return [fields[name][1] for name in names]


def _laid_out(
    formats: Mapping[str, Any], offsets: list[int], itemsize: int
) -> np.dtype[Any]:
    """Return a dtype with these fields, in order, at the first of ``offsets``.

    Raises:
        ValueError: a field ends after ``itemsize``.
    """
    own_offsets = offsets[: len(formats)]
    # In numpy the same check can overflow 32 bits, and then it reads out of bounds.
    sizes = (np.dtype(each).itemsize for each in formats.values())
    if max(at + size for at, size in zip(own_offsets, sizes, strict=True)) > itemsize:
        raise ValueError(itemsize)
    return np.dtype(
        {
            "names": list(formats),
            "formats": list(formats.values()),
            "offsets": own_offsets,
            "itemsize": itemsize,
        }
    )
