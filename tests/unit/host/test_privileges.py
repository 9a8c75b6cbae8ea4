# SPDX-License-Identifier: GPL-3.0-only
"""Which users --user accepts; tests/kernel switches to one of them."""

import pwd
import re

import pytest

from tcpexporter.errors import SettingsError
from tcpexporter.host.privileges import find_user


def test_a_user_is_found_by_name() -> None:
    """The account has the uid and gid to switch to."""
    unprivileged = next(each for each in pwd.getpwall() if each.pw_uid)
    assert find_user(unprivileged.pw_name) == unprivileged


@pytest.mark.parametrize("name", ["no-such-user", "65534", "", "nobody ", "a\0b"])
def test_an_unknown_user_is_refused(name: str) -> None:
    """The error names the user and the flag to set; a uid is not a name."""
    with pytest.raises(
        SettingsError, match=re.escape(f"no user {name!r}: choose one with --user")
    ):
        find_user(name)


def test_root_is_refused() -> None:
    """Any name of uid 0 is refused: root would keep its privileges."""
    names = [each.pw_name for each in pwd.getpwall() if each.pw_uid == 0]
    assert names
    for name in names:
        with pytest.raises(SettingsError, match=f"'{name}' is root.*--user"):
            find_user(name)
