# SPDX-License-Identifier: GPL-3.0-only
import os
from pathlib import Path

import pytest

from tcpexporter.errors import SettingsError, SourceError
from tcpexporter.host import namespaces

NUMBERS = [2, 3, 5, 7]
"""Inodes of namespaces that are held."""


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory in place of /run/netns: an inode has the name of a file."""
    monkeypatch.setattr(namespaces, "NAMED", tmp_path)
    return tmp_path


def touched(path: Path) -> int:
    path.touch()
    return path.stat().st_ino


def names_of(containers: dict[int, str], held: list[int]) -> namespaces.Names:
    names = namespaces.Names(lambda: held)
    names._containers = containers
    return names


def test_no_two_namespaces_have_the_same_name(named: Path) -> None:
    """Each series is told apart from those of other namespaces, and ours is ``self``."""
    another, blue = (touched(named / name) for name in ("self", "blue"))
    containers = {2: "container:abc", 3: "container:abc", 5: "container:def"}
    assert names_of(containers, NUMBERS).read() == {
        namespaces.inode(): "self",
        another: f"self:{another}",
        blue: "blue",
        2: "container:abc:2",
        3: "container:abc:3",
        5: "container:def",
        7: "7",
    }


@pytest.mark.parametrize("name", ["other", "self", "4026532177", "blue:7", "7"])
def test_a_name_that_another_series_can_have_is_told_apart(named: Path, name: str) -> None:
    """Two series with the same labels: Prometheus would refuse the whole page."""
    number = touched(named / name)
    assert names_of({}, []).read()[number] == f"{name}:{number}"


def test_a_name_that_is_not_text_is_shown(named: Path) -> None:
    """A name is bytes; as a label it could not be encoded, and no page be had."""
    number = touched(named / os.fsdecode(b"blue\xff"))
    assert names_of({}, []).read()[number] == "blue\ufffd"


def test_the_first_of_several_names_is_the_label(named: Path) -> None:
    """Not the one that the directory has last, which may be another at each scrape."""
    number = touched(named / "green")
    for name in ("red", "blue", "white"):
        os.link(named / "green", named / name)
    assert names_of({}, []).read()[number] == "blue"


def test_a_container_loses_its_name_with_its_namespace() -> None:
    """A name bound to a number: what is not held can be another namespace by now."""
    held = list(NUMBERS)
    names = names_of({2: "container:abc", 3: "container:def"}, held)
    assert names.read().get(3) == "container:def"
    held.remove(3)
    assert names.read().get(2) == "container:abc"
    assert names.read().get(3) is None


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("none-such", r"no network namespace /run/netns/none-such \(No such file"),
        ("/proc/0/ns/net", r"no network namespace /proc/0/ns/net \(No such file"),
        ("/dev/null/net", r"\(Not a directory\)"),
        ("n" * 300, r"\(File name too long\)"),
        ("/dev/null", "/dev/null is not a network namespace"),
        ("/proc/self/ns/uts", "/proc/self/ns/uts is not a network namespace"),
    ],
)
def test_what_is_no_network_namespace_is_a_wrong_setting(name: str, complaint: str) -> None:
    """A setting that is refused will be refused again: systemd is not to try for ever."""
    with pytest.raises(SettingsError, match=complaint):
        namespaces.find(name)


def test_a_namespace_that_is_another_already_is_not_watched() -> None:
    """It was made anew between being entered and being watched."""
    with pytest.raises(SourceError, match="is another network namespace now"):
        namespaces.Watch("/proc/self/ns/net", namespaces.inode() + 1)
