# SPDX-License-Identifier: GPL-3.0-only
"""Series as tuples: IP version, flags, port, network namespace, and perhaps cgroup."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from tcpexporter.connections.series import SERIES, SERIES_BYTES, Series

Row: TypeAlias = tuple[int, int, int, int]

ORDER = ("ip_version", "flags", "port", "netns", "cgroup")


def series_of_rows(rows: Iterable[Sequence[int]]) -> Series:
    """Return the series of tuples; a field that a tuple does not have is 0."""
    given = [*rows]
    series = np.zeros(len(given), SERIES)
    for made, row in zip(series, given, strict=True):
        for name, value in zip(ORDER, row, strict=False):
            made[name] = value
    return series.view(SERIES_BYTES)


def rows_of(series: Series) -> list[Row]:
    """Return series as tuples, without their cgroup."""
    columns = [series.view(SERIES)[each].tolist() for each in ORDER[:4]]
    return list(zip(*columns, strict=True))
