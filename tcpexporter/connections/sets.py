# SPDX-License-Identifier: GPL-3.0-only
"""Treats arrays as sets, by sorting.

np.unique with none of return_counts, return_index and return_inverse imports numpy.ma, and
so does np.isin of arrays that require sorting. That requires 1.2 MiB, and the confined
process cannot read the file. Since numpy 2.3, the former also hashes integers: for a
million of them, it takes fifty times as long as sorting.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value", bound=np.generic)


def distinct(*arrays: npt.NDArray[Value]) -> npt.NDArray[Value]:
    """Return each value of one or more arrays once, in ascending order."""
    values, _ = np.unique(np.concatenate(arrays), return_counts=True)
    return values


def is_in(
    values: npt.NDArray[Value], known: npt.NDArray[Value] | Sequence[int]
) -> npt.NDArray[np.bool_]:
    """Return for each value whether it is among the known ones."""
    _, is_known = find(np.sort(np.asarray(known, values.dtype)), values)
    return is_known


def find(
    ordered: npt.NDArray[Value], values: npt.NDArray[Value]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Find values in an array that is in ascending order.

    Returns:
        For each value, the index of the first element that is equal to it, and whether
        there is one. If there is none, the index is that of another element, or 0 if
        the array is empty.
    """
    if not len(ordered):
        return np.zeros(len(values), np.intp), np.zeros(len(values), np.bool_)
    index = np.searchsorted(ordered, values)
    np.minimum(index, len(ordered) - 1, out=index)
    return index, ordered[index] == values
