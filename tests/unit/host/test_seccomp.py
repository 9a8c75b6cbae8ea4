# SPDX-License-Identifier: GPL-3.0-only
"""The filter is made with pyseccomp, or with the distribution's module seccomp."""

import ctypes.util
import sys
from types import ModuleType

import pytest

from tcpexporter.host import seccomp

BINDINGS = ("pyseccomp", "seccomp")


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [(BINDINGS, "pyseccomp"), (("pyseccomp",), "pyseccomp"), (("seccomp",), "seccomp")],
)
def test_one_binding_suffices(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], chosen: str
) -> None:
    """If both are installed, it is the one that deploy/lock has."""
    hide(monkeypatch, *BINDINGS)
    for name in installed:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert seccomp._import_library().__name__ == chosen


def test_without_a_binding_the_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are tried."""
    hide(monkeypatch, *BINDINGS)
    with pytest.raises(ImportError, match="import of seccomp halted"):
        seccomp._import_library()


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let imports of these modules fail; `seccomp._import_library` changes another one."""
    monkeypatch.setattr(ctypes.util, "find_library", ctypes.util.find_library)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
