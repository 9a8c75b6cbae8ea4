# SPDX-License-Identifier: GPL-3.0-only
"""Numbers the owners of cgroups: those whose labels are equal have the same number."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

import numpy as np

from tcpexporter.connections.parts import OWNER_LABELS
from tcpexporter.connections.selection import UNKNOWN_OWNER, Cgroups
from tcpexporter.connections.series import SERIES, Series
from tcpexporter.connections.sets import is_in
from tcpexporter.metrics.owners import Owner, owner_of, owner_of_unnamed

FORGET_NS = 300_000_000_000
"""Time from the removal of a cgroup until its counters are forgotten, in ns."""


def _name_of(owners: Collection[Owner]) -> str:
    """Return ``container:NAME`` if all owners have that container, else ``pod:UID``.

    If the owners are in different containers and different pods, the text is empty.
    """
    for kind in ("container", "pod"):
        names = {getattr(each, kind) for each in owners}
        if len(names) == 1 and "" not in names:
            return f"{kind}:{names.pop()}"
    return ""


class Paths(Protocol):
    """The paths of cgroups: `host.cgroups.CgroupPaths`."""

    def paths(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the path of each cgroup whose path is known, by id; forget other ids."""
        ...

    def removed(self, ids: Iterable[int]) -> AbstractSet[int]:
        """Return those of the ids whose cgroup no longer exists."""
        ...


class OwnerNumbers:
    """The owners of the cgroups that a source has connections or counters of.

    Only one thread at a time may use it. A cgroup keeps its owner from one collection to
    the next, also if it is removed meanwhile. A number is never reused for other labels.
    """

    def __init__(self, labels: Sequence[str], paths: Paths | None) -> None:
        """Use the labels that distinguish owners.

        Args:
            labels: some of `OWNER_LABELS`; other names are ignored.
            paths: the paths of cgroups; None: no path is known.
        """
        self._fields = [each for each in OWNER_LABELS if each in labels]
        self._paths = paths
        self._owners: dict[int, Owner] = {}
        """The owner of each cgroup whose path is known."""
        self._requested: set[int] = set()
        """The cgroups of this collection."""
        self._numbers = {self._labels(owner_of_unnamed(0)): UNKNOWN_OWNER}
        self._by_number = {UNKNOWN_OWNER: owner_of_unnamed(0)}
        self._next = UNKNOWN_OWNER + 1
        self._removed_ns: dict[int, int] = {}

    def numbers(self, cgroups: Cgroups) -> Cgroups:
        """Return the number of the owner of each cgroup; see `selection.Owners`."""
        ids, place = np.unique(cgroups, return_inverse=True)
        listed = ids.tolist()
        self._requested.update(listed)
        if self._paths and not self._owners.keys() >= {*listed} - {0}:
            found = self._paths.paths(self._requested | self._owners.keys())
            for each in found.keys() - self._owners.keys():
                self._owners[each] = owner_of(found[each])
        numbers = np.array([self._number(each) for each in listed], np.uint64)
        return numbers[place]

    def of(self, number: int) -> Owner:
        """Return one of the owners with this number; all of them have equal labels."""
        return self._by_number[number]

    def cgroups_of(self, unit: str, cgroups: Cgroups) -> list[int]:
        """Return known cgroups whose innermost systemd unit has this name.

        The result has those of ``cgroups``, and can have others.
        """
        self.numbers(cgroups)
        return [each for each, owner in self._owners.items() if owner.unit == unit]

    def of_namespaces(self, series: Series) -> dict[int, str]:
        """Return the container or pod that owns the sockets of each namespace, by inode.

        A namespace whose sockets belong to several containers has the name of their pod. It
        is missing if they belong to several pods or to none. Removed cgroups do not count:
        another namespace may have the inode now.

        Args:
            series: series of the source; ``cgroup`` is the id of a cgroup.
        """
        fields = series.view(SERIES)
        self.numbers(fields["cgroup"].astype(np.uint64))
        found: defaultdict[int, set[Owner]] = defaultdict(set)
        pairs = zip(fields["netns"].tolist(), fields["cgroup"].tolist(), strict=True)
        for netns, cgroup in {*pairs}:
            owner = self._owners.get(cgroup)
            if owner and owner.container and cgroup not in self._removed_ns:
                found[netns].add(owner)
        names = {netns: _name_of(owners) for netns, owners in found.items()}
        return {netns: name for netns, name in names.items() if name}

    def is_known(self, numbers: Cgroups) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Return whether each number has an owner, or is 0 (no particular owner)."""
        return is_in(numbers, [0, *self._by_number])

    def present(self, numbers: Collection[int]) -> Iterator[Owner]:
        """Yield the distinct owners of this collection that have these numbers, sorted."""
        found = {
            self._owners.get(each) or owner_of_unnamed(each)
            for each in self._requested - {0}
        }
        yield from sorted(
            each for each in found if self._numbers[self._labels(each)] in numbers
        )

    def finish(self, now_ns: int) -> list[int]:
        """End a collection: forget the cgroups that it did not request.

        Args:
            now_ns: the present time on CLOCK_BOOTTIME.

        Returns:
            The cgroups that were found removed more than FORGET_NS ago: their counters are
            not needed any more.
        """
        requested, self._requested = self._requested, set()
        for each in self._owners.keys() - requested:
            del self._owners[each]
        used = {self._labels(each) for each in self._owners.values()}
        for labels, number in [*self._numbers.items()]:
            if labels not in used and number != UNKNOWN_OWNER:
                del self._numbers[labels], self._by_number[number]
        removed = self._paths.removed(requested) if self._paths else ()
        self._removed_ns = {each: self._removed_ns.get(each, now_ns) for each in removed}
        return [
            each for each, since in self._removed_ns.items() if now_ns - since > FORGET_NS
        ]

    def _number(self, cgroup: int) -> int:
        owner = self._owners.get(cgroup)
        if owner is None:
            return UNKNOWN_OWNER
        number = self._numbers.setdefault(self._labels(owner), self._next)
        if number == self._next:
            self._by_number[number] = owner
            self._next += 1
        return number

    def _labels(self, owner: Owner) -> tuple[str, ...]:
        return tuple(getattr(owner, each) for each in self._fields)
