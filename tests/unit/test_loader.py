# SPDX-License-Identifier: GPL-3.0-only
"""What the loader makes of a refusal."""

import errno
import os
import resource

import pytest

from tcpexporter import loader


@pytest.mark.parametrize(
    ("number", "has_hint"), [(errno.EPERM, True), (errno.ENOMEM, False), (None, False)]
)
def test_a_limit_of_locked_memory_is_named(
    number: int | None, monkeypatch: pytest.MonkeyPatch, *, has_hint: bool
) -> None:
    """Where a map as large as the largest is refused so, as by kernels before 5.11."""

    def create_map(_kind: int, _key: int, _value: int, *, entries: int) -> int:
        assert entries == 1009
        if number:
            raise OSError(number, os.strerror(number))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(loader, "create_map", create_map)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    hint = loader._locked_memory_hint(1009)
    assert ("64 KiB" in hint and "LimitMEMLOCK" in hint) == has_hint
    assert bool(hint) == has_hint
