# SPDX-License-Identifier: GPL-3.0-only
"""Imports a submodule without running its package's ``__init__``, to save memory."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from types import ModuleType


@contextlib.contextmanager
def part_of(package: str) -> Iterator[ModuleType]:
    """Let the block import modules of ``package`` without running its ``__init__``.

    Inside the block, the package has no attributes except the modules that the block
    imports. After the block, a normal import of the package imports all of it. If the
    package was imported before, the block uses it unchanged.

    Yields:
        The package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if package in sys.modules:
        yield sys.modules[package]
        return
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = module_from_spec(spec)
    try:
        yield sys.modules[package]
    finally:
        del sys.modules[package]
