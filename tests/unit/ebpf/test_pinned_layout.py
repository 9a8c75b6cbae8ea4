# SPDX-License-Identifier: GPL-3.0-only
"""Layouts of pinned maps: those of this version, of version 0.2, and malformed ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpexporter.connections.parts import OutboundPort
from tcpexporter.connections.record import CONNECTION, KEY
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.pinned_layout import (
    FIELDS,
    KEY_FIELDS,
    LAYOUT_WORDS,
    MAGIC,
    OLD_FIELDS,
    OLD_MAGIC,
    WORD_FORMAT,
    Layout,
    checksum,
    make,
    read,
)

COUNTED = Request(max_connections=7, netns=0, secret=(3, 5))
WITH_BOUNDS = replace(COUNTED, lifetime_bounds=(122070, 732421))
OURS = make(COUNTED).tolist()

OLD_RECORD_BYTES, OLD_KEY_BYTES = 64, 40
OLD = [
    *(OLD_MAGIC, OLD_RECORD_BYTES, OLD_KEY_BYTES),
    *(0, 16, 56),  # established_ns, key, group
    *(0, 16, 32, 36, 38),
    *[0] * 5,
]
"""What version 0.2 pinned, as captured from a kernel in tests/fuzz/seeds/pinned/layout."""

FORMAT_AT = 3 + len(FIELDS) + len(KEY_FIELDS)


def layout(said: list[int], **changed: int) -> npt.NDArray[np.uint32]:
    """Return a layout with some words changed; ``w3`` is the word 3."""
    words = np.array(said, np.uint32)
    for name, word in changed.items():
        words[int(name[1:])] = word
    return words


def offsets(dtype: np.dtype[Any], names: tuple[str, ...]) -> list[int]:
    assert dtype.fields is not None
    return [dtype.fields[name][1] for name in names]


def test_our_own_layout_is_accepted() -> None:
    """Each field has its own offset, and the counters can be adopted."""
    found = read(make(COUNTED), COUNTED)
    assert found.record.itemsize == CONNECTION.itemsize
    assert offsets(found.record, FIELDS) == offsets(CONNECTION, FIELDS)
    assert offsets(found.record["key"], KEY_FIELDS) == offsets(KEY, KEY_FIELDS)
    assert not found.is_old
    assert found.is_continued
    assert len(OURS) == len(OLD) == LAYOUT_WORDS


def test_the_layout_of_version_0_2_is_accepted() -> None:
    """Its connections have a time and a group; there are no counters to adopt."""
    found = read(layout(OLD), COUNTED)
    assert found.record.names == OLD_FIELDS
    assert found.record.itemsize == OLD_RECORD_BYTES
    assert offsets(found.record, OLD_FIELDS) == [0, 16, 56]
    assert offsets(found.record["key"], KEY_FIELDS) == offsets(KEY, KEY_FIELDS)
    assert found.is_old
    assert not found.is_continued


def test_a_record_of_another_version_may_be_longer() -> None:
    """Fields that are added at the end, or between others, do no harm."""
    found = read(layout(OURS, w1=128, w3=64, w4=120), COUNTED)
    assert found.record.itemsize == 128
    assert offsets(found.record, FIELDS) == [64, 120]
    assert found.is_continued


@pytest.mark.parametrize(
    ("said", "words"),
    [
        *[
            (said, words)
            for said in (OURS, OLD)
            for words in (
                {"w0": MAGIC + 1},
                {"w0": OLD_MAGIC - 1},
                {"w1": 0},
                {"w1": CONNECTION.itemsize + 4},
                {"w2": KEY.itemsize - 1},
                {"w2": 2**31 - 1},
                {"w2": 2**32 - 1},
                {"w3": 2**32 - 1},
            )
        ],
        (OURS, {"w1": CONNECTION.itemsize - 16}),
        (OURS, {"w3": CONNECTION.itemsize - KEY.itemsize + 1}),
        (OURS, {"w3": 671088640, "w2": 2013265960}),  # their sum has more than 32 bits
        (OURS, {"w4": CONNECTION.itemsize - 3}),
        (OURS, {"w5": KEY.itemsize - 15}),
        (OURS, {f"w{FORMAT_AT}": WORD_FORMAT + 1}),
        (OURS, {f"w{FORMAT_AT}": 0}),
        (OLD, {"w1": OLD_RECORD_BYTES - 8}),
        (OLD, {"w3": OLD_RECORD_BYTES - 7}),
        (OLD, {"w4": 671088640, "w2": 2013265960}),
        (OLD, {"w6": OLD_KEY_BYTES - 15}),
    ],
)
def test_a_field_outside_of_its_record_is_refused(
    said: list[int], words: dict[str, int]
) -> None:
    """numpy alone would read there, which would crash the process.

    An unknown magic number or division of a word is refused too.
    """
    with pytest.raises(ValueError, match=r"^\d+$|C int"):
        read(layout(said, **words), COUNTED)


def assert_within(layout: Layout) -> None:
    """Check that no field ends after its record, nor a field of the key after the key."""
    for dtype in (layout.record, layout.record["key"]):
        assert dtype.fields is not None
        for kind, offset, *_ in dtype.fields.values():
            assert 0 <= offset <= offset + kind.itemsize <= dtype.itemsize


any_word = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(0, 130),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1]),
)


@given(
    said=st.sampled_from([OURS, OLD]),
    changed=st.dictionaries(
        st.integers(0, LAYOUT_WORDS - 1), any_word, max_size=LAYOUT_WORDS
    ),
)
@example(said=OURS, changed={1: 2**32 - 8})
@example(said=OLD, changed={1: 2**32 - 8, 2: 2**32 - 8})
def test_any_words_are_refused_or_describe_fields_within_the_record(
    said: list[int], changed: dict[int, int]
) -> None:
    """No other exception is raised."""
    words = layout(said, **{f"w{at}": word for at, word in changed.items()})
    try:
        found = read(words, COUNTED)
    except ValueError:
        return
    assert_within(found)
    assert found.record.itemsize == words[1]
    assert found.record.itemsize % 8 == 0
    assert found.is_old == (words[0] == OLD_MAGIC)
    if found.is_continued:
        assert words[FORMAT_AT:].tolist()[:3] == OURS[FORMAT_AT:][:3]


@pytest.mark.parametrize(
    "request_",
    [
        replace(COUNTED, max_connections=11),
        replace(COUNTED, max_series=11),
        replace(COUNTED, secret=(1, 2)),
        replace(COUNTED, own_listener=(4026531840, 9690)),
        replace(COUNTED, without=("recursion_misses",)),
    ],
)
def test_the_same_series_are_continued(request_: Request) -> None:
    """Another capacity, secret or listener does not change what is counted separately."""
    assert read(make(COUNTED), request_).is_continued
    assert checksum(request_) == checksum(COUNTED)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (COUNTED, WITH_BOUNDS),
        (WITH_BOUNDS, COUNTED),
        (WITH_BOUNDS, replace(WITH_BOUNDS, lifetime_bounds=(122070, 732422))),
        (WITH_BOUNDS, replace(WITH_BOUNDS, lifetime_bounds=(122070,))),
        (WITH_BOUNDS, replace(WITH_BOUNDS, lifetime_bounds=(122070, 732421, 7324218))),
        (COUNTED, replace(COUNTED, outbound_port=OutboundPort.LOCAL)),
        (
            replace(COUNTED, outbound_port=OutboundPort.LOCAL),
            replace(COUNTED, outbound_port=OutboundPort.REMOTE),
        ),
        (COUNTED, replace(COUNTED, by_netns=True)),
        (COUNTED, replace(COUNTED, netns=4026531840)),
        (replace(COUNTED, netns=4026531840), replace(COUNTED, netns=4026531841)),
    ],
)
def test_other_series_are_not_continued(before: Request, after: Request) -> None:
    """The settings have changed: ages are adopted, and counters begin at 0."""
    found = read(make(before), after)
    assert not found.is_continued
    assert found.record == read(make(after), after).record


def test_an_entry_of_another_size_is_not_continued() -> None:
    """A later version may count more in each entry of the ledger."""
    assert not read(layout(OURS, **{f"w{FORMAT_AT + 1}": 48}), COUNTED).is_continued
