# SPDX-License-Identifier: GPL-3.0-only
"""Tests the Debian package on a machine with systemd; `make vm-test` runs them in a guest.

The tests depend on each other: the first one installs the package, and the last one purges
it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import ESTABLISHED, Peers, bpf_programs, eventually, inside, new_netns
from tests.vm.service import busy, end_by, get, is_active, is_ready, long_term, state

PACKAGES = Path("/share")
"""Has two packages of this tree, whose versions differ in the revision."""
DEFAULT = Path("/etc/default/tcpexporter")
UNIT = Path("/usr/lib/systemd/system/tcpexporter.service")
PINNED = Path("/sys/fs/bpf/tcpexporter")
KEPT = (Path("/var/lib/tcpexporter"), Path("/var/lib/private/tcpexporter"))
DROP_IN = Path("/etc/systemd/system/tcpexporter.service.d/test.conf")

VENV = Path("/usr/lib/tcpexporter")
"""Only the package of Debian 12 has a virtual environment."""
INTERPRETER = VENV / "bin/python3" if sys.version_info < (3, 12) else "/usr/bin/python3"

PROGRAM = "on_state_change"
"""The name of the BPF program."""

RESTART = ("restart",)
WATCHDOG_S = 5

PYTHON = "/usr/lib/tcpexporter/bin/python3"
HANGS = Path("/etc/tcpexporter-hangs.py")
HANGING_PROGRAM = """
import os
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.__main__ import main
end, _never_closed = os.pipe()
collections = 0
read = EbpfSource.read
def read_or_hang(self):
    global collections
    collections += 1
    if collections > 20:
        os.read(end, 1)
    return read(self)
EbpfSource.read = read_or_hang
main()
"""
"""An exporter whose 21st collection never ends: it reads a pipe that stays empty."""


@pytest.fixture(scope="module", autouse=True)
def unprovisioned() -> None:
    """Remove the service that vagrant/provision.sh has installed, if the guest has it."""
    subprocess.run(["systemctl", "disable", "--now", "tcpexporter"], check=False)
    Path("/etc/systemd/system/tcpexporter.service").unlink(missing_ok=True)
    Path("/usr/local/bin/tcpexporter").unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", PINNED, *KEPT], check=True)
    subprocess.run(["systemctl", "daemon-reload"], check=True)


def dpkg(*arguments: str | Path) -> None:
    # Without a terminal dpkg does not ask questions: it fails.
    subprocess.run(["dpkg", *arguments], stdin=subprocess.DEVNULL, check=True)


def package(revision: int) -> Path:
    (path,) = PACKAGES.glob(f"tcpexporter_*-{revision}~*.deb")
    return path


def pid() -> int:
    return int(state("tcpexporter", "MainPID"))


def has_metric(line: str) -> bool:
    return line in (get("/metrics") or "").splitlines()


@pytest.fixture
def settings() -> Iterator[None]:
    """Restore the environment file, and restart the service with it."""
    before = DEFAULT.read_text()
    yield
    DEFAULT.write_text(before)
    subprocess.run(["systemctl", "reset-failed", "tcpexporter"], check=True)
    end_by(RESTART)


def add_setting(line: str) -> None:
    with DEFAULT.open("a") as file:
        file.write(f"{line}\n")


@contextlib.contextmanager
def drop_in(*lines: str) -> Iterator[None]:
    """Add lines to the section [Service] of the unit, without a restart."""
    DROP_IN.parent.mkdir()
    DROP_IN.write_text("\n".join(["[Service]", *lines, ""]))
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    try:
        yield
    finally:
        DROP_IN.unlink()
        DROP_IN.parent.rmdir()
        subprocess.run(["systemctl", "daemon-reload"], check=True)


def test_the_service_runs_after_the_installation() -> None:
    """It is enabled, counts by BPF, and is the command of the package."""
    dpkg("--install", package(1))
    assert state("tcpexporter", "UnitFileState") == "enabled"
    assert state("tcpexporter", "FragmentPath") in (
        str(UNIT),
        f"/{UNIT.relative_to('/usr')}",
    )
    eventually(partial(is_ready, 0))
    assert is_active("tcpexporter")
    assert has_metric('tcpexporter_source_info{source="ebpf"} 1.0')
    command = Path(f"/proc/{pid()}/cmdline").read_bytes().split(b"\0")
    assert command[:3] == [os.fsencode(INTERPRETER), b"-I", b"/usr/bin/tcpexporter"]
    for limit in ("seccomp", "landlock", "unprivileged_user"):
        assert has_metric(f'tcpexporter_confined{{by="{limit}"}} 1.0')


def test_the_unit_has_no_error() -> None:
    """systemd knows each line of it, and its limit of memory is in force."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "tcpexporter.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tcpexporter" not in done.stderr
    assert int(state("tcpexporter", "MemoryMax")) == 1 << 30
    assert int(state("tcpexporter", "MemoryCurrent")) < 1 << 28


@pytest.mark.usefixtures("settings")
def test_a_setting_takes_effect_after_a_restart() -> None:
    """Settings are lines of /etc/default/tcpexporter."""
    add_setting("TCPEXPORTER_DURATION=20")
    end_by(RESTART)
    assert has_metric("tcpexporter_duration_seconds 20.0")


@pytest.mark.usefixtures("settings")
def test_a_reload_reads_the_settings_file_again() -> None:
    """The process stays the same."""
    conf = Path("/etc/tcpexporter.conf")
    conf.write_text("duration 7\n")
    add_setting(f"TCPEXPORTER_CONF={conf}")
    end_by(RESTART)
    assert has_metric("tcpexporter_duration_seconds 7.0")
    before = pid()
    conf.write_text("duration 11\n")
    subprocess.run(["systemctl", "reload", "tcpexporter"], check=True)
    eventually(lambda: has_metric("tcpexporter_duration_seconds 11.0"))
    assert pid() == before
    conf.unlink()


@pytest.mark.usefixtures("settings")
def test_an_upgrade_keeps_ages() -> None:
    """Connections are long-term from the moment at which the new version is ready.

    Settings in /etc/default/tcpexporter stay.
    """
    add_setting("TCPEXPORTER_DURATION=20")
    end_by(RESTART)
    with Peers() as peers:
        peers.connect(5)
        with busy(peers):
            eventually(lambda: long_term(peers.port) == 5)
            before = pid()
            dpkg("--install", package(2))
            eventually(partial(is_ready, before))
            for _ in range(7):
                assert long_term(peers.port) == 5
                time.sleep(0.1)
    assert has_metric("tcpexporter_duration_seconds 20.0")
    shown = subprocess.check_output(["dpkg-query", "--show", "tcpexporter"], text=True)
    assert "-2~" in shown


@pytest.mark.usefixtures("settings")
def test_an_invalid_setting_stops_restarts() -> None:
    """systemd does not restart the service after exit code 2; an upgrade succeeds."""
    add_setting("TCPEXPORTER_DURATION=forever")
    subprocess.run(["systemctl", "restart", "tcpexporter"], check=False)
    time.sleep(int(state("tcpexporter", "RestartUSec").removesuffix("s")) + 2)
    assert state("tcpexporter", "ActiveState") == "failed"
    assert state("tcpexporter", "ExecMainStatus") == "2"
    assert state("tcpexporter", "NRestarts") == "0"
    dpkg("--install", package(2))
    assert state("tcpexporter", "ActiveState") == "failed"


def test_the_watchdog_restarts_an_exporter_that_hangs() -> None:
    """A stopped process is one: it sends systemd no message."""
    with drop_in(f"WatchdogSec={WATCHDOG_S}"):
        end_by(RESTART)
        hung = pid()
        os.kill(hung, signal.SIGSTOP)
        eventually(partial(is_ready, hung))


def test_the_watchdog_restarts_an_exporter_whose_collection_hangs() -> None:
    """It has counted before; the journal says that the watchdog ended it."""
    HANGS.write_text(HANGING_PROGRAM)
    start = f"ExecStart={PYTHON} {HANGS}"
    with drop_in(f"WatchdogSec={WATCHDOG_S}", "ExecStart=", start):
        end_by(RESTART)
        hung = pid()
        assert has_metric('tcpexporter_source_info{source="ebpf"} 1.0')
        eventually(lambda: get("/metrics") is None)  # until systemd ends the process
        eventually(partial(is_ready, hung))
    HANGS.unlink()
    journal = subprocess.check_output(
        ["journalctl", "--output=cat", "--no-pager", "--unit=tcpexporter"], text=True
    )
    assert re.search(rf"Killing process {hung} \(.*\) with signal SIGABRT", journal)
    end_by(RESTART)


@pytest.mark.usefixtures("settings")
def test_all_namespaces_are_counted_with_the_documented_privileges() -> None:
    """A comment of the unit has the lines of the drop-in."""
    comment = re.findall(r"(?m)^#     (\w+=.*)$", UNIT.read_text())
    assert len(comment) == 4
    add_setting("TCPEXPORTER_NETNS=all")
    with drop_in(*comment), new_netns() as name:
        end_by(RESTART)
        with inside(name):
            peers = Peers()
            peers.connect(3)
        with peers:
            labels = f'netns="{name}",port="{peers.port}",tcp_version="4"'
            series = f"{ESTABLISHED}{{{labels}}} 3.0"
            eventually(lambda: has_metric(series))
    assert has_metric('tcpexporter_source_info{source="ebpf"} 1.0')


@pytest.mark.usefixtures("settings")
def test_the_journal_has_json() -> None:
    """Each line of the exporter is an object."""
    add_setting("TCPEXPORTER_LOG_FORMAT=json")
    end_by(RESTART)
    lines = subprocess.check_output(
        ["journalctl", "--output=cat", "--no-pager", f"_PID={pid()}"], text=True
    ).splitlines()
    assert lines
    assert all(json.loads(line)["message"] for line in lines)


def test_an_upgrade_does_not_start_a_disabled_service() -> None:
    """An administrator has disabled and stopped it."""
    subprocess.run(["systemctl", "disable", "--now", "tcpexporter"], check=True)
    dpkg("--install", package(2))
    assert state("tcpexporter", "UnitFileState") == "disabled"
    assert not is_active("tcpexporter")
    subprocess.run(["systemctl", "enable", "--now", "tcpexporter"], check=True)
    eventually(partial(is_ready, 0))


def test_removal_stops_the_service() -> None:
    """The settings and the ages stay, so that another installation continues them."""
    assert is_active("tcpexporter")
    dpkg("--remove", "tcpexporter")
    assert not is_active("tcpexporter")
    assert get("/metrics") is None
    assert not UNIT.exists()
    assert not VENV.exists()
    assert not Path("/usr/lib/python3/dist-packages/tcpexporter").exists()
    assert DEFAULT.exists()
    assert list(PINNED.iterdir())


def test_a_purge_removes_all_state() -> None:
    """The kernel stops recording, because nothing is pinned."""
    assert PROGRAM in bpf_programs()
    dpkg("--purge", "tcpexporter")
    for each in (DEFAULT, PINNED, *KEPT):
        assert not each.exists()
    assert state("tcpexporter", "LoadState") == "not-found"
    eventually(lambda: PROGRAM not in bpf_programs())
