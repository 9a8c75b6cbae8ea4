# SPDX-License-Identifier: GPL-3.0-only
"""Importing a part of a package, each time in a Python of its own."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    """What a program prints."""
    return subprocess.check_output([sys.executable, "-c", program], text=True)


def test_a_part_is_imported_alone() -> None:
    """What only the package's ``__init__`` asks for is not imported."""
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


def test_the_package_is_whole_afterwards() -> None:
    """Who imports it later, or has imported it before, gets all of it and the same part."""
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


def test_a_package_that_is_missing() -> None:
    """It is reported as Python does."""
    program = 'from tcpexporter.lean import part_of\nwith part_of("nowhere"): pass'
    with pytest.raises(subprocess.CalledProcessError) as failed:
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
    last = failed.value.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'nowhere'"
