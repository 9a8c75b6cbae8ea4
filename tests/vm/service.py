# SPDX-License-Identifier: GPL-3.0-only
"""The machine of ``vagrant/``, seen from within: run by `make vm-test` in a guest."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.kernel.test_process import status
from tests.support import ESTABLISHED, LONG_TERM, Peers, eventually, meanwhile

SETTINGS = Path("/etc/default/tcpexporter")
CONF = Path("/etc/tcpexporter.conf")
PINNED = Path("/sys/fs/bpf/tcpexporter")
COMMAND = "/usr/local/bin/tcpexporter"

SERVICES = ("tcpexporter", "prometheus")

INSTALLED = (
    Path("/usr/local/bin/tcpexporter"),
    Path("/etc/systemd/system/tcpexporter.service"),
    Path("/etc/prometheus/prometheus.yml"),
    Path("/etc/prometheus/tcpexporter.rules.yml"),
)


def state(service: str, what: str) -> str:
    shown = subprocess.check_output(
        ["systemctl", "show", "--property", what, "--value", service], text=True
    )
    return shown.strip()


def is_active(service: str) -> bool:
    return state(service, "ActiveState") == "active"


def prometheus(query: str) -> float | None:
    """What Prometheus knows of one series."""
    url = f"http://localhost:9090/api/v1/query?{urlencode({'query': query})}"
    with urllib.request.urlopen(url) as response:
        results = json.load(response)["data"]["result"]
    return float(results[0]["value"][1]) if results else None


def test_the_services_start_with_the_machine() -> None:
    """Nobody has started them since it booted."""
    for service in SERVICES:
        assert state(service, "UnitFileState") == "enabled"
        eventually(partial(is_active, service))


def test_provisioning_again_changes_nothing() -> None:
    """It takes no network, says that Prometheus scrapes, and leaves what it installed."""
    before = [path.read_bytes() for path in INSTALLED]
    subprocess.run(["vagrant/provision.sh"], check=True)
    assert [path.read_bytes() for path in INSTALLED] == before
    assert prometheus('up{job="tcpexporter"}') == 1


def test_prometheus_shows_what_is_connected() -> None:
    """Connections to a port of this machine, by way of the service and a scrape."""
    with Peers() as peers:
        peers.connect(7)
        query = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}}'
        eventually(lambda: prometheus(query) == 7)


def test_the_exporter_has_no_privilege() -> None:
    """It has loaded its program, and is neither root nor anything else by now."""
    eventually(lambda: prometheus('tcpexporter_source_info{source="ebpf"}') == 1)
    pid = int(state("tcpexporter", "MainPID"))
    shown = status(pid, pid)
    assert "0" not in shown["Uid"] + shown["Gid"] + shown["Groups"]
    for held in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(shown[held][0], 16) == 0, held
    assert shown["NoNewPrivs"] == ["1"]
    assert shown["Seccomp"] == ["2"]


def test_its_unit_is_hardened() -> None:
    """What systemd makes of it is 2.0 or better."""
    subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--threshold=20", "tcpexporter"],
        check=True,
    )


def test_a_killed_exporter_is_started_again() -> None:
    """systemd does so, and the new one knows the connections from before."""
    killed = int(state("tcpexporter", "MainPID"))
    with Peers() as peers:
        peers.connect(11)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: int(state("tcpexporter", "MainPID")) not in (0, killed))
        query = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}}'
        eventually(lambda: prometheus(query) == 11)


def get(path: str) -> str | None:
    """A page of the service, None while it has none."""
    url = f"http://localhost:9690{path}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url) as page:
        text: str = page.read().decode()
        return text
    return None


def long_term(port: int) -> int:
    """How many connections to a port are, as the service itself shows it."""
    series = f'{LONG_TERM}{{port="{port}",tcp_version="4"}}'
    lines = (get("/metrics") or "").splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(series))


def is_ready(before: int) -> bool:
    """Whether another process than that serves, and knows what was there."""
    another = int(state("tcpexporter", "MainPID")) not in (0, before)
    return another and get("/-/ready") is not None


RESTART = ("restart",)
KILL = ("kill", "--signal=KILL")


def end_by(ending: tuple[str, ...]) -> None:
    """Have the service end and start again."""
    before = int(state("tcpexporter", "MainPID"))
    subprocess.run(["systemctl", *ending, "tcpexporter"], check=True)
    eventually(partial(is_ready, before))


@contextlib.contextmanager
def with_settings(*lines: str) -> Iterator[None]:
    """The service has them, until it is started the next time."""
    SETTINGS.write_text("".join(f"{line}\n" for line in lines))
    try:
        end_by(RESTART)
        yield
    finally:
        SETTINGS.unlink()


@contextlib.contextmanager
def busy(peers: Peers) -> Iterator[None]:
    """Always something just sent: the socket tables do not know how old they are."""

    def talk() -> None:
        for client, server in peers.pairs:
            client.send(server.send(b"x") * b"x")
            client.recv(1)
            server.recv(1)

    with meanwhile(talk, pause_s=0.1):
        yield


@pytest.mark.parametrize(
    ("without", "endings"),
    [
        pytest.param("", (RESTART, KILL), id="pinned"),
        pytest.param("TCPEXPORTER_PIN=", (RESTART,), id="saved"),
    ],
)
def test_an_age_goes_on_over_a_restart(
    without: str, endings: tuple[tuple[str, ...], ...]
) -> None:
    """A connection that is long-term stays so, from when the service is ready."""
    with (
        with_settings("TCPEXPORTER_DURATION=20", without),
        Peers() as peers,
    ):
        peers.connect(5)
        with busy(peers):
            eventually(lambda: long_term(peers.port) == 5)
            for ending in endings:
                end_by(ending)
                for _ in range(7):
                    assert long_term(peers.port) == 5
                    time.sleep(0.1)


def test_settings_are_read_again() -> None:
    """`systemctl reload` does that, and the status says that it counts all the while."""
    CONF.write_text("duration 7\nport 9090\n")
    with with_settings(f"TCPEXPORTER_CONF={CONF}"):
        before = state("tcpexporter", "MainPID")
        assert "tcpexporter_duration_seconds 7.0" in (get("/metrics") or "")
        assert state("tcpexporter", "StatusText").startswith("counting connections by ebpf")
        CONF.write_text("duration 11\nport 9090\n")
        subprocess.run(["systemctl", "reload", "tcpexporter"], check=True)
        eventually(lambda: "tcpexporter_duration_seconds 11.0" in (get("/metrics") or ""))
        eventually(partial(is_active, "tcpexporter"))
        assert state("tcpexporter", "MainPID") == before
        assert state("tcpexporter", "WatchdogUSec") == "1min"
    CONF.unlink()


def test_root_unpins_what_the_service_left() -> None:
    """It belongs to a user who is gone; the service starts all the same."""
    end_by(RESTART)
    subprocess.run(["systemctl", "stop", "tcpexporter"], check=True)
    assert list(PINNED.iterdir())
    subprocess.run([COMMAND, "--unpin", "--pin", PINNED], check=True)
    assert not PINNED.exists()
    subprocess.run(["systemctl", "start", "tcpexporter"], check=True)
    eventually(partial(is_ready, 0))
    assert list(PINNED.iterdir())
