# SPDX-License-Identifier: GPL-3.0-only
"""Cgroups that exist in memory only, and their owners."""

from collections.abc import Iterable, Sequence

from tcpexporter.metrics.owner_numbers import OwnerNumbers

PATHS = {
    3: "/system.slice/ssh.service",
    5: "/system.slice/ssh.service/below",
    7: "/system.slice/docker-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope",  # noqa: E501
    11: "/nothing/known",
    2**63 + 13: "/user.slice/user-1000.slice/session-3.scope",
}
"""By id; the first two have the same owner."""

WITHOUT_PATH = 17
"""The id of a cgroup that has no path."""


class MadePaths:
    """The paths of cgroups, some of which have been removed."""

    def __init__(self, paths: dict[int, str]) -> None:
        self.known = paths
        self.gone: set[int] = set()

    def paths(self, ids: Iterable[int]) -> dict[int, str]:
        return {each: self.known[each] for each in ids if each in self.known}

    def removed(self, ids: Iterable[int]) -> set[int]:
        return self.gone.intersection(ids)


def made_owners(labels: Sequence[str]) -> OwnerNumbers:
    """Return the owners of the cgroups of `PATHS`."""
    return OwnerNumbers(labels, MadePaths(PATHS))
