# SPDX-License-Identifier: GPL-3.0-only
"""Label values of series."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from tcpexporter.connections.series import FOLDED, OUTBOUND, REMOTE_PORT, SERIES, Series

Labels: TypeAlias = tuple[str, ...]
"""The values of one series."""

Fields: TypeAlias = tuple[int, int, int, int]
"""Those of `SERIES`: IP version, flags, port and network namespace."""


def label_values(
    series: Series, labels: Sequence[str], names: Mapping[int, str]
) -> list[Labels]:
    """Return the label values of each series.

    Args:
        series: the series.
        labels: the names of the labels.
        names: the names of network namespaces, by inode.
    """
    rows: list[Fields] = series.view(SERIES).tolist()
    ways = [_ways(names)[each] for each in labels]
    return [tuple(way(row) for way in ways) for row in rows]


def _ways(names: Mapping[int, str]) -> dict[str, Callable[[Fields], str]]:
    return {
        "port": lambda row: "" if row[1] & REMOTE_PORT else _port(row),
        "remote_port": lambda row: _port(row) if row[1] & REMOTE_PORT else "",
        "tcp_version": lambda row: str(row[0]),
        "direction": lambda row: "outbound" if row[1] & OUTBOUND else "inbound",
        "netns": lambda row: _netns(row, names),
    }


def _port(row: Fields) -> str:
    return "other" if row[1] & FOLDED else str(row[2] or "")


def _netns(row: Fields, names: Mapping[int, str]) -> str:
    netns = row[3]
    if not netns and row[1] & FOLDED:
        return "other"
    return names.get(netns, str(netns))
