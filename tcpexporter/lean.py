# SPDX-License-Identifier: GPL-3.0-only
"""Imports a part of a package whose ``__init__`` would import all of it."""

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from types import ModuleType


@contextlib.contextmanager
def part_of(package: str) -> Iterator[ModuleType]:
    """Until the end of the block, importing a module of ``package`` imports that alone.

    Gives the package, in which its modules find nothing but each other. Whoever imports
    it afterwards gets it whole, as always; so does the block if it is imported already.
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
