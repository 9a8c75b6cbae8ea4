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
    ordered = np.sort(np.asarray(known, values.dtype))
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    found: npt.NDArray[np.bool_] = (
        ordered.take(np.searchsorted(ordered, values), mode="clip") == values
    )
    return found
