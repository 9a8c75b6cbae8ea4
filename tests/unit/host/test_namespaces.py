# SPDX-License-Identifier: GPL-3.0-only
"""Names of network namespaces as labels, and settings that name a namespace."""

import os
from pathlib import Path

import pytest

from tcpexporter.errors import SettingsError, SourceError
from tcpexporter.host import namespaces

NUMBERS = [2, 3, 5, 7]
"""Inodes of the namespaces that are held open."""


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Create a directory in place of /run/netns; each inode is that of a file."""
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
    """Series of different namespaces have different labels, and our namespace is
    ``self``."""
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
def test_a_name_that_collides_with_another_label_is_changed(named: Path, name: str) -> None:
    """Otherwise two series would have equal labels, and Prometheus would refuse the
    scrape."""
    number = touched(named / name)
    assert names_of({}, []).read()[number] == f"{name}:{number}"


def test_a_name_that_is_not_utf_8_is_escaped(named: Path) -> None:
    """Names are bytes, and a label that cannot be encoded would break the exposition."""
    number = touched(named / os.fsdecode(b"blue\xff"))
    assert names_of({}, []).read()[number] == "blue\ufffd"


def test_the_first_of_several_names_in_order_is_the_label(named: Path) -> None:
    """The order of the directory may change between scrapes, so names are sorted."""
    number = touched(named / "green")
    for name in ("red", "blue", "white"):
        os.link(named / "green", named / name)
    assert names_of({}, []).read()[number] == "blue"


def test_a_container_loses_its_name_when_its_namespace_is_closed() -> None:
    """The inode of a namespace that is not held open may belong to another one by now."""
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
        ("/" + "n" * 300, r"\(File name too long\)"),
        ("/dev/null", "/dev/null is not a network namespace"),
        ("/proc/self/ns/uts", "/proc/self/ns/uts is not a network namespace"),
    ],
)
def test_a_path_that_is_not_a_network_namespace_is_refused(
    name: str, complaint: str
) -> None:
    """It is an invalid setting, so systemd does not restart the exporter."""
    with pytest.raises(SettingsError, match=complaint):
        namespaces.find(name)


def test_a_replaced_namespace_is_refused() -> None:
    """The namespace was replaced after it was entered, before it was watched."""
    with pytest.raises(SourceError, match="is another network namespace now"):
        namespaces.Watch("/proc/self/ns/net", namespaces.inode() + 1)
