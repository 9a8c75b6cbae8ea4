# SPDX-License-Identifier: GPL-3.0-only
"""Label values of series."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from tcpexporter.connections.series import FOLDED, OUTBOUND, REMOTE_PORT, SERIES, Series
from tcpexporter.metrics.owners import Owner, owner_of_unnamed

Labels: TypeAlias = tuple[str, ...]
"""The label values of one series."""

NO_OWNER = 0
"""The owner number of a folded series, which has no particular owner."""


class Fields(NamedTuple):
    """The fields of a series, in the order of `SERIES`."""

    owner: int
    """In a series of an exposition, ``cgroup`` is the number of the owner."""
    netns: int
    port: int
    flags: int
    ip_version: int


def label_values(
    series: Series,
    labels: Sequence[str],
    names: Mapping[int, str],
    owner: Callable[[int], Owner] = owner_of_unnamed,
) -> list[Labels]:
    """Return the label values of each series.

    Args:
        series: the series.
        labels: the names of the labels.
        names: the names of network namespaces, by inode.
        owner: returns the owner that has a given number.
    """
    rows = [Fields(*row) for row in series.view(SERIES).tolist()]
    ways = _ways(names, owner)
    chosen = [ways[each] for each in labels]
    return [tuple(way(row) for way in chosen) for row in rows]


def _ways(
    names: Mapping[int, str], owner: Callable[[int], Owner]
) -> dict[str, Callable[[Fields], str]]:
    def of_owner(field: str) -> Callable[[Fields], str]:
        return lambda row: (
            "other" if row.owner == NO_OWNER else str(getattr(owner(row.owner), field))
        )

    return {
        "port": lambda row: "" if row.flags & REMOTE_PORT else _port(row),
        "remote_port": lambda row: _port(row) if row.flags & REMOTE_PORT else "",
        "tcp_version": lambda row: str(row.ip_version),
        "direction": lambda row: "outbound" if row.flags & OUTBOUND else "inbound",
        "netns": lambda row: _netns(row, names),
        **{each: of_owner(each) for each in ("unit", "container", "pod")},
    }


def _port(row: Fields) -> str:
    return "other" if row.flags & FOLDED else str(row.port or "")


def _netns(row: Fields, names: Mapping[int, str]) -> str:
    if not row.netns and row.flags & FOLDED:
        return "other"
    return names.get(row.netns, str(row.netns))
