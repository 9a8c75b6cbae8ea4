# SPDX-License-Identifier: GPL-3.0-only
"""`make install` and `make uninstall` on a system without a package."""

import os
import subprocess
from pathlib import Path

import pytest

from deploy.sbom import ROOT
from tcpexporter.version import VERSION

DEFAULT = "etc/default/tcpexporter"
PREFIX = "opt/local"
EPOCH = "1700000000"


def make(target: str, destdir: Path) -> str:
    """Run a make target; return its standard error."""
    done = subprocess.run(
        ["make", "-s", target, f"PREFIX=/{PREFIX}", f"DESTDIR={destdir}"],
        cwd=ROOT,
        env=os.environ | {"SOURCE_DATE_EPOCH": EPOCH},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stderr


def files(directory: Path) -> set[str]:
    return {
        str(each.relative_to(directory))
        for each in directory.rglob("*")
        if each.is_symlink() or each.is_file()
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("root")
    said = make("install", directory)
    assert f"installed in {directory}" in said
    assert "systemctl" not in said  # the service is not on this host
    return directory


def test_the_files_are_below_the_prefix(installed: Path) -> None:
    """Only the environment file is elsewhere."""
    elsewhere = {each for each in files(installed) if not each.startswith(f"{PREFIX}/")}
    assert elsewhere == {DEFAULT}
    unit = installed / PREFIX / "lib/systemd/system/tcpexporter.service"
    assert f"ExecStart=/{PREFIX}/bin/tcpexporter\n" in unit.read_text()


def test_the_installed_exporter_runs(installed: Path) -> None:
    """All required packages are there, and compiled modules do not contain DESTDIR."""
    python = installed / PREFIX / "lib/tcpexporter/bin/python3"
    shown = subprocess.check_output([python, "-I", "-m", "tcpexporter", "--version"])
    assert VERSION in shown.decode()
    compiled = [*installed.rglob("tcpexporter/__pycache__/startup.*.pyc")]
    assert len(compiled) == 1
    assert os.fsencode(installed) not in compiled[0].read_bytes()


def test_uninstall_leaves_nothing(installed: Path) -> None:
    """Settings that an administrator has written stay, and the message says so."""
    settings = installed / DEFAULT
    unchanged = settings.read_text()
    settings.write_text(f"{unchanged}TCPEXPORTER_PORT=443\n")
    assert "/etc/default/tcpexporter has settings" in make("uninstall", installed)
    assert files(installed) == {DEFAULT}
    settings.write_text(unchanged)
    make("uninstall", installed)
    assert not files(installed)
