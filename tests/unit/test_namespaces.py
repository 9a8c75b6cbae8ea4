# SPDX-License-Identifier: GPL-3.0-only
from pathlib import Path

import pytest

from tcpexporter import namespaces


def test_no_two_namespaces_have_the_same_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each series is told apart from those of other namespaces, and ours is ``self``."""
    monkeypatch.setattr(namespaces, "NAMED", tmp_path)
    for name in ("self", "blue"):
        (tmp_path / name).touch()
    another, blue = ((tmp_path / name).stat().st_ino for name in ("self", "blue"))
    names = namespaces.Names()
    names._containers = {2: "container:abc", 3: "container:abc", 5: "container:def"}
    assert names.read() == {
        namespaces.inode(): "self",
        another: f"self:{another}",
        blue: "blue",
        2: "container:abc:2",
        3: "container:abc:3",
        5: "container:def",
    }
