# SPDX-License-Identifier: GPL-3.0-only
"""Importing a submodule without its package; each test starts another Python process."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    """Run a program and return its output."""
    return subprocess.check_output([sys.executable, "-c", program], text=True)


def test_a_submodule_is_imported_without_its_package() -> None:
    """Imports of the package's ``__init__`` are not executed."""
    assert (
        run("""
import sys
from tcpexporter.lean import part_of
with part_of("pyroute2"):
    from pyroute2.netlink.diag import SS_LISTEN
print(SS_LISTEN, "pyroute2.ndb" in sys.modules, "pyroute2" in sys.modules)
""")
        == "10 False False\n"
    )


def test_the_package_can_be_imported_afterwards() -> None:
    """The package is complete and has the same submodule, whether it is imported before
    or after."""
    for before in ("pass", "import pyroute2"):
        assert (
            run(f"""
{before}
from tcpexporter.lean import part_of
with part_of("pyroute2"):
    from pyroute2.netlink.diag import inet_diag_req as ours
import pyroute2
from pyroute2.netlink import diag
print(pyroute2.IPRoute.__name__, diag.inet_diag_req is ours)
""")
            == "IPRoute True\n"
        )


def test_a_missing_package_is_an_import_error() -> None:
    """The error is Python's own."""
    program = 'from tcpexporter.lean import part_of\nwith part_of("nowhere"): pass'
    with pytest.raises(subprocess.CalledProcessError) as failed:
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
    last = failed.value.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'nowhere'"
