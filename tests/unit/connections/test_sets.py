# SPDX-License-Identifier: GPL-3.0-only
"""Arrays as sets, compared with Python's sets."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tcpexporter
from tcpexporter.connections.series import SERIES_BYTES
from tcpexporter.connections.sets import distinct, find, is_in

numbers = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5))


@given(arrays=st.lists(numbers, min_size=1, max_size=3))
def test_distinct_values_are_those_of_a_set(arrays: list[list[int]]) -> None:
    """They are in ascending order."""
    found = distinct(*(np.array(each, np.uint64) for each in arrays))
    assert found.tolist() == sorted({value for each in arrays for value in each})


@given(values=numbers, known=numbers)
def test_known_values_are_those_of_a_set(values: list[int], known: list[int]) -> None:
    """This holds for arrays and lists, of any length."""
    array = np.array(values, np.uint64)
    expected = [value in {*known} for value in values]
    assert is_in(array, np.array(known, np.uint64)).tolist() == expected
    assert is_in(array, known).tolist() == expected


@given(values=numbers, ordered=numbers.map(sorted))
def test_values_are_found_where_a_list_has_them(
    values: list[int], ordered: list[int]
) -> None:
    """Every index is one of the array, unless the array is empty."""
    arrays = (np.array(each, np.uint64) for each in (ordered, values))
    index, is_found = find(*arrays)
    assert is_found.tolist() == [value in ordered for value in values]
    assert all(0 <= each < max(1, len(ordered)) for each in index)
    found = [value for value in values if value in ordered]
    assert index[is_found].tolist() == [ordered.index(value) for value in found]


def test_series_are_compared_as_bytes() -> None:
    """A series that is a prefix of another one is a different value."""
    series = np.array([b"\0\1", b"\0\1\2", b"\3"], SERIES_BYTES)
    assert is_in(series, series[1:2]).tolist() == [False, True, False]
    assert find(series, series[1:2])[0].tolist() == [1]
    assert distinct(series[::-1], series).tolist() == series.tolist()


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield the place of each call of a function of numpy, and the call."""
    for path in Path(tcpexporter.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="np"))):
                    yield f"{path}:{node.lineno}", node


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("unique", {"return_index", "return_inverse", "return_counts"}),
        ("setdiff1d", {"assume_unique"}),
    ],
)
def test_no_call_imports_numpy_ma(function: str, options: set[str]) -> None:
    """numpy imports it when one of these functions is called without such an option."""
    found = 0
    for place, call in calls():
        assert isinstance(call.func, ast.Attribute)
        if call.func.attr == function:
            found += 1
            assert {each.arg for each in call.keywords} & options, place
    assert found
