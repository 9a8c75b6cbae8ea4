# SPDX-License-Identifier: GPL-3.0-only
r"""Finds the paths of cgroups by their ids, in the file system cgroup2: cgroups(7).

The id of a cgroup is the inode number of its directory: Linux kernel commit 40430452fd5d
("kernfs: use 64bit inos if ino_t is 64bit") and 743210386c03 ("cgroup: use cgrp->kn->id as
the cgroup ID") (both in v5.5). With an earlier kernel or a 32-bit ino_t, the inode number
is in the lower 32 bits of the id: then the caller passes only these bits.

The kernel does not return the path of an id to an unprivileged process:
open_by_handle_at(2) requires CAP_DAC_READ_SEARCH. So `CgroupPaths` lists the directories
until it has found all ids: a walk. A walk requires only the right to list directories.
Cgroups are created and removed meanwhile:

1. A cgroup was created after the previous walk: an id without a path starts a new walk.
2. A cgroup was removed before the first walk: its id has no path. Two complete walks must
   miss an id before `removed` reports it. One is not sufficient: kernfs_dir_next_pos() can
   skip a directory if its predecessor in the listing is removed at that moment.
3. A cgroup was removed later: its id keeps the path until it is not requested any more.
4. A new cgroup has the path of a removed one, for example after the restart of a service:
   its id differs, and both ids have the same path. `removed` compares the inode number.
5. A directory is removed during a walk: it cannot be opened (ENOENT), and has no cgroups
   below it any more. The walk is complete without it.
6. A directory cannot be opened for another reason: the walk is incomplete, so no id counts
   as removed because of it.
7. The mount shows only a part of the tree (a container): the ids outside have no path, and
   do not count as removed.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

MOUNTINFO = Path("/proc/self/mountinfo")

UNKNOWN = 0
"""The id of no cgroup: the kernel did not report which cgroup a socket is in."""

ROOT_ID = 1
"""The id of the root cgroup of the host: kernfs numbers the nodes of a tree from 1."""

LEAF_LINKS = 2
"""st_nlink of a directory that has no directories: kernfs_refresh_inode()."""

COMPLETE_WALKS = 2
"""An id that this many complete walks do not find is the id of a removed cgroup."""

FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
"""Walks for the same ids are repeated after pauses that double, up to the last."""

CHECK_INTERVAL_S = 10.0
"""Minimum time between checks whether the known cgroups exist."""

_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A mount of the file system cgroup2."""

    point: str
    """The directory where it is mounted."""
    root: str
    """The path of its top directory in the cgroup namespace of this process.

    It begins with "/.." if that directory is above the root of the namespace."""


class _Place(NamedTuple):
    """Where the cgroup of an id is, or was."""

    directory: str
    """The directory, below the mount point."""
    path: str
    """The path as in /proc/PID/cgroup."""


def find(mountinfo: Path = MOUNTINFO) -> Mount | None:
    """Return the mount of cgroup2 that shows most cgroups, or None if there is none.

    On a host with version 1 and version 2, it is usually at /sys/fs/cgroup/unified. Mounts
    that other mounts hide do not count.
    """
    mounts = list(_visible_mounts(mountinfo.read_text(errors="surrogateescape")))
    return max(mounts, key=_extent, default=None)


def open_paths() -> "CgroupPaths | None":
    """Return the paths of the host's cgroups; None: no cgroup has a path.

    If the paths of some cgroups are not known, the exporter logs a warning that says why.
    """
    mount = find()
    if mount is None:
        log.warning(
            "cgroups have numbers instead of names: the file system cgroup2 is not mounted;"
            " in a container, mount the host's /sys/fs/cgroup"
        )
        return None
    paths = CgroupPaths(mount)
    if not paths.is_whole:
        log.warning(
            "only cgroups below %s have names: in a container, mount the host's"
            " /sys/fs/cgroup",
            mount.point,
        )
    return paths


def _visible_mounts(mountinfo: str) -> Iterator[Mount]:
    """Yield the mounts of cgroup2 in proc_pid_mountinfo(5) that a process can reach."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ")[0] == "cgroup2":
            number, _, _, root, point, *_ = before.split(" ")
            mount = Mount(_without_escapes(point), _without_escapes(root))
            if _mount_number(mount.point) == int(number):
                yield mount


def _without_escapes(field: str) -> str:
    """Return a field without the escapes of space, tab, newline and backslash."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), field)


def _mount_number(point: str) -> int | None:
    """Return the mount that a directory belongs to, from proc_pid_fdinfo(5)."""
    try:
        directory = os.open(point, os.O_PATH)
    except OSError:
        return None
    try:
        fields = Path(f"/proc/self/fdinfo/{directory}").read_text().split()
    finally:
        os.close(directory)
    return int(fields[fields.index("mnt_id:") + 1])


def _extent(mount: Mount) -> tuple[bool, int]:
    """Return a key that is greater for a mount that shows more of the tree."""
    return mount.root.startswith("/.."), -len(mount.root)


class CgroupPaths:
    """Finds the paths of cgroups by their ids. Only one thread at a time may use it."""

    def __init__(self, mount: Mount, clock: Callable[[], float] = time.monotonic) -> None:
        """Open the top directory, which keeps the file system mounted.

        Args:
            mount: where the file system cgroup2 is mounted.
            clock: returns the time in seconds.

        Raises:
            OSError: the directory cannot be opened.
        """
        self.descriptor = os.open(mount.point, os.O_PATH | os.O_DIRECTORY)
        """Refers to the top directory, which must stay listable: `restrict_files`."""
        # Not the mount point: another file system could be mounted there later. os.scandir
        # would duplicate a descriptor, which seccomp refuses.
        self._top = f"/proc/self/fd/{self.descriptor}"
        root = "" if mount.root.startswith("/..") else mount.root
        self._prefix = root.rstrip("/")
        self.is_whole = _inode(self._top) == ROOT_ID
        """Whether the mount shows all cgroups of the host."""
        self._clock = clock
        self._places: dict[int, _Place] = {}
        self._removed: set[int] = set()
        self._missed: dict[int, int] = {}
        """The number of complete walks that did not find an id, for ids without a path."""
        self._pause_s = FIRST_PAUSE_S
        self._next_walk_s = 0.0
        self._next_check_s = 0.0

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def paths(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the path of each cgroup, as in /proc/PID/cgroup, by its id.

        Ids without a known path are missing. Other ids than these are forgotten.
        """
        requested = set(ids) - {UNKNOWN}
        self._forget_others(requested)
        unknown = requested - self._places.keys() - self._removed
        if unknown and self._is_time_to_look_for(unknown):
            self._look_for(unknown)
        return {each: place.path for each, place in self._places.items()}

    def removed(self, ids: Iterable[int]) -> set[int]:
        """Return those of the ids whose cgroup no longer exists.

        The ids must be among those of the last call of `paths`. A removal is reported after
        `CHECK_INTERVAL_S` at the latest.
        """
        now_s = self._clock()
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + CHECK_INTERVAL_S
            for each, place in self._places.items():
                if each not in self._removed and self._is_removed(each, place):
                    self._removed.add(each)
        return self._removed.intersection(ids)

    def _forget_others(self, requested: set[int]) -> None:
        for each in self._places.keys() - requested:
            del self._places[each]
        for each in self._missed.keys() - requested:
            del self._missed[each]
        self._removed &= requested

    def _is_time_to_look_for(self, unknown: set[int]) -> bool:
        """Return whether an id is new, or the pause since the last walk has ended."""
        if unknown - self._missed.keys():
            self._pause_s = FIRST_PAUSE_S
            return True
        if self._clock() < self._next_walk_s:
            return False
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        return True

    def _look_for(self, unknown: set[int]) -> None:
        missing = set(unknown)
        is_complete = self._walk(missing)
        self._next_walk_s = self._clock() + self._pause_s
        for each in unknown - missing:
            self._missed.pop(each, None)
        for each in missing:
            walks = self._missed.get(each, 0) + (is_complete and self.is_whole)
            self._missed[each] = walks
            if walks >= COMPLETE_WALKS:
                self._removed.add(each)

    def _walk(self, missing: set[int]) -> bool:
        """List directories until no id is missing; remove found ids from ``missing``.

        Returns:
            Whether all directories could be listed.
        """
        is_complete = True
        if (top := _inode(self._top)) in missing:
            self._found(top, "", missing)
        pending = [""]
        while pending and missing:
            above = pending.pop()
            try:
                below = _directories(self._top + above)
            except FileNotFoundError:
                continue  # case 5
            except OSError as error:
                log.debug("cannot list cgroups below %s: %s", above, error.strerror)
                is_complete = False  # case 6
                continue
            for inode, name in below:
                directory = f"{above}/{name}"
                pending.append(directory)
                if inode in missing:
                    self._found(inode, directory, missing)
        return is_complete

    def _found(self, inode: int, directory: str, missing: set[int]) -> None:
        path = (self._prefix + directory) or "/"
        # Names are bytes, labels are text. An ASCII name needs no conversion: then both
        # fields usually are one string in memory.
        if not path.isascii():
            path = os.fsencode(path).decode(errors="backslashreplace")
        self._places[inode] = _Place(directory, path)
        missing.discard(inode)

    def _is_removed(self, cgroup_id: int, place: _Place) -> bool:
        try:
            return _inode(self._top + place.directory) != cgroup_id
        except FileNotFoundError:
            return True
        except OSError:
            return False  # an ancestor cannot be searched


def _inode(directory: str) -> int:
    return os.stat(directory).st_ino  # noqa: PTH116  a Path would be made for each


def _directories(path: str) -> list[tuple[int, str]]:
    """Return the inode numbers and names of the directories in a directory.

    The kernel reports both with the listing: no directory is opened for it. A directory
    without directories is not listed: its files would take most of the time.
    """
    if os.stat(path).st_nlink == LEAF_LINKS:  # noqa: PTH116  a Path would be made for each
        return []
    with os.scandir(path) as entries:
        return [
            (entry.inode(), entry.name)
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
        ]
