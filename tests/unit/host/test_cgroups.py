# SPDX-License-Identifier: GPL-3.0-only
"""The paths of cgroups by their ids, in temporary directories instead of cgroups."""

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpexporter.host import cgroups
from tcpexporter.host.cgroups import (
    CHECK_INTERVAL_S,
    COMPLETE_WALKS,
    FIRST_PAUSE_S,
    LAST_PAUSE_S,
    CgroupPaths,
    Mount,
)

ABSENT = 7**11
"""An inode number that no directory has."""


class Tree:
    """A directory whose subdirectories have ids, and a clock that the test moves."""

    def __init__(self, top: Path, root: str = "/") -> None:
        self.top = top
        self.now_s = 1000.0
        self.walks = 0
        """The number of times that the top directory was listed."""
        self.paths = CgroupPaths(Mount(str(top), root), lambda: self.now_s)

    def make(self, path: str) -> int:
        directory = self.top / path
        directory.mkdir(parents=True)
        return self.id(path)

    def id(self, path: str) -> int:
        return (self.top / path).stat().st_ino

    def found(self, *ids: int) -> dict[int, str]:
        return self.paths.paths(ids)

    def removed(self, *ids: int) -> set[int]:
        self.now_s += CHECK_INTERVAL_S
        return self.paths.removed(ids)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    monkeypatch.setattr(cgroups, "ROOT_ID", tmp_path.stat().st_ino)
    made = Tree(tmp_path)
    listed = cgroups._directories

    def counted(path: str) -> list[tuple[int, str]]:
        made.walks += path == made.paths._top
        return listed(path)

    monkeypatch.setattr(cgroups, "_directories", counted)
    yield made
    made.paths.close()


def test_ids_have_the_paths_of_their_directories(tree: Tree) -> None:
    """Directories without requested ids, and files, have no path."""
    deep, other = tree.make("a.slice/b.service/c"), tree.make("d.slice")
    (tree.top / "a.slice" / "cgroup.procs").touch()
    assert tree.found(deep, other) == {deep: "/a.slice/b.service/c", other: "/d.slice"}


def test_the_top_directory_has_the_path_of_the_root(tree: Tree) -> None:
    root = tree.id(".")
    assert tree.found(root) == {root: "/"}


def test_known_ids_do_not_cause_a_walk(tree: Tree) -> None:
    known = tree.make("a")
    for _ in range(3):
        tree.now_s += LAST_PAUSE_S
        assert tree.found(known) == {known: "/a"}
    assert tree.walks == 1


def test_a_directory_that_was_created_later_is_found_at_once(tree: Tree) -> None:
    """Case 1: there is no pause before the walk for a new id."""
    first = tree.make("a")
    tree.found(first, ABSENT)
    second = tree.make("b")
    assert tree.found(first, second, ABSENT) == {first: "/a", second: "/b"}


def test_a_removed_directory_keeps_its_path_while_it_is_requested(tree: Tree) -> None:
    """Case 3: the path is forgotten when the id is not requested any more."""
    gone = tree.make("a")
    tree.found(gone)
    (tree.top / "a").rmdir()
    assert tree.found(gone) == {gone: "/a"}
    assert tree.removed(gone) == {gone}
    assert tree.found(gone) == {gone: "/a"}
    assert tree.found() == {}
    assert tree.found(gone) == {}


def test_two_ids_can_have_one_path(tree: Tree) -> None:
    """Case 4: the second directory of this path is another one."""
    first = tree.make("a.service")
    tree.found(first)
    (tree.top / "a.service").rename(tree.top.parent / "kept")  # else the inode is reused
    second = tree.make("a.service")
    assert second != first
    assert tree.found(first, second) == {first: "/a.service", second: "/a.service"}
    assert tree.removed(first, second) == {first}
    (tree.top.parent / "kept").rmdir()


def test_an_id_that_was_never_found_counts_as_removed_after_two_walks(tree: Tree) -> None:
    """Case 2: then no further walk looks for it."""
    for walk in range(1, COMPLETE_WALKS + 1):
        assert tree.removed(ABSENT) == set()
        assert tree.found(ABSENT) == {}
        assert tree.walks == walk
    assert tree.removed(ABSENT) == {ABSENT}
    tree.now_s += LAST_PAUSE_S
    assert tree.found(ABSENT) == {}
    assert tree.walks == COMPLETE_WALKS


def test_walks_for_the_same_ids_have_growing_pauses(tree: Tree) -> None:
    """Case 7: the mount shows only a part of the tree, so ids never count as removed."""
    tree.paths.is_whole = False
    times = []
    for _ in range(600):
        before = tree.walks
        tree.found(ABSENT)
        if tree.walks > before:
            times.append(tree.now_s)
        tree.now_s += FIRST_PAUSE_S
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, LAST_PAUSE_S]
    assert set(pauses[7:]) == {LAST_PAUSE_S}
    assert tree.removed(ABSENT) == set()


def test_a_directory_that_vanishes_during_a_walk_has_no_effect(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 5: the walk is complete without it."""
    tree.make("gone/below")
    wanted = tree.make("a")
    listed = cgroups._directories

    def removing(path: str) -> list[tuple[int, str]]:
        below = listed(path)
        if path == tree.paths._top and (tree.top / "gone").exists():
            (tree.top / "gone" / "below").rmdir()
            (tree.top / "gone").rmdir()
        return below

    monkeypatch.setattr(cgroups, "_directories", removing)
    for _ in range(COMPLETE_WALKS):
        assert tree.found(wanted, ABSENT) == {wanted: "/a"}
        tree.now_s += FIRST_PAUSE_S
    assert tree.removed(wanted, ABSENT) == {ABSENT}


def test_an_incomplete_walk_does_not_make_ids_removed(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 6: a directory cannot be listed, and later it can."""
    hidden = tree.make("closed/below")
    listed = cgroups._directories
    refuses = True

    def refusing(path: str) -> list[tuple[int, str]]:
        if refuses and path.endswith("/closed"):
            raise PermissionError(13, os.strerror(13))
        return listed(path)

    monkeypatch.setattr(cgroups, "_directories", refusing)
    for _ in range(7):
        assert tree.found(hidden) == {}
        tree.now_s += LAST_PAUSE_S
    assert tree.removed(hidden) == set()
    refuses = False
    assert tree.found(hidden) == {hidden: "/closed/below"}


def test_removals_are_looked_for_at_intervals(tree: Tree) -> None:
    """Between two checks, `removed` returns the result of the first."""
    gone = tree.make("a")
    tree.found(gone)
    assert tree.removed(gone) == set()
    (tree.top / "a").rmdir()
    tree.now_s += CHECK_INTERVAL_S / 2
    assert tree.paths.removed({gone}) == set()
    tree.now_s += CHECK_INTERVAL_S / 2
    assert tree.paths.removed({gone}) == {gone}


def test_the_id_0_is_of_no_cgroup(tree: Tree) -> None:
    assert tree.found(cgroups.UNKNOWN) == {}
    assert tree.removed(cgroups.UNKNOWN) == set()
    assert tree.walks == 0


def test_a_name_that_is_not_utf_8_is_escaped(tree: Tree) -> None:
    """Names are bytes; labels are text."""
    name = os.fsdecode(b"a\xff b")
    odd = tree.make(name)
    assert tree.found(odd) == {odd: r"/a\xff b"}
    assert tree.removed(odd) == set()


@pytest.mark.parametrize(
    ("root", "path"),
    [("/", "/a"), ("/docker/b", "/docker/b/a"), ("/../..", "/a")],
)
def test_the_root_of_the_mount_is_part_of_the_path(
    tmp_path: Path, root: str, path: str
) -> None:
    """The last two are bind mounts: of a subtree, and of a directory above the root of the
    cgroup namespace."""
    tree = Tree(tmp_path, root)
    known = tree.make("a")
    assert tree.found(known) == {known: path}
    assert not tree.paths.is_whole
    tree.paths.close()


def mountinfo(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the number of the mount that a process finds at each mount point."""
    visible: dict[str, int] = {}
    monkeypatch.setattr(cgroups, "_mount_number", visible.get)
    return visible


def test_version_2_is_found_next_to_version_1(
    tmp_path: Path, numbers: dict[str, int]
) -> None:
    numbers["/sys/fs/cgroup/unified"] = 41
    file = mountinfo(
        tmp_path,
        "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
        "32 31 0:29 / /sys/fs/cgroup/cpu rw shared:9 master:2 - cgroup cgroup rw,cpu",
        "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate",
    )
    assert cgroups.find(file) == Mount("/sys/fs/cgroup/unified", "/")


def test_the_mount_that_shows_most_cgroups_is_found(
    tmp_path: Path, numbers: dict[str, int]
) -> None:
    """In a container, a mount of the host's directory shows more than its own."""
    numbers |= {"/sys/fs/cgroup": 7, "/host/sys cgroup": 8, "/part": 9}
    own = "7 1 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw"
    hosts = r"8 1 0:26 /../.. /host/sys\040cgroup ro - cgroup2 cgroup rw"
    part = "9 1 0:26 /a /part ro - cgroup2 cgroup rw"
    found = cgroups.find(mountinfo(tmp_path, part, hosts, own))
    assert found == Mount("/host/sys cgroup", "/../..")
    assert cgroups.find(mountinfo(tmp_path, part, own)) == Mount("/sys/fs/cgroup", "/")


def test_a_mount_that_another_one_hides_does_not_count(
    tmp_path: Path, numbers: dict[str, int]
) -> None:
    numbers["/sys/fs/cgroup"] = 8
    file = mountinfo(
        tmp_path,
        "7 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw",
        "8 1 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw",
    )
    assert cgroups.find(file) is None


def test_without_the_file_system_one_warning_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "find", lambda: None)
    assert cgroups.open_paths() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cgroup2 is not mounted" in record.message


def test_with_a_part_of_the_tree_a_warning_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "find", lambda: Mount(str(tmp_path), "/"))
    paths = cgroups.open_paths()
    assert paths is not None
    paths.close()
    (record,) = caplog.records
    assert f"only cgroups below {tmp_path} have names" in record.message
