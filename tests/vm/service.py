# SPDX-License-Identifier: GPL-3.0-only
"""Tests the machine of ``vagrant/`` from within; `make vm-test` runs them in a guest."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.kernel.test_process import status
from tests.support import ESTABLISHED, LONG_TERM, Peers, eventually, repeating

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
    """Return the value of a series in Prometheus."""
    url = f"http://localhost:9090/api/v1/query?{urlencode({'query': query})}"
    with urllib.request.urlopen(url) as response:
        results = json.load(response)["data"]["result"]
    return float(results[0]["value"][1]) if results else None


def test_the_services_start_at_boot() -> None:
    """No command has started them since the machine booted."""
    for service in SERVICES:
        assert state(service, "UnitFileState") == "enabled"
        eventually(partial(is_active, service))


def test_provisioning_again_changes_nothing() -> None:
    """It requires no network, reports that Prometheus scrapes, and keeps what is
    installed."""
    before = [path.read_bytes() for path in INSTALLED]
    subprocess.run(["vagrant/provision.sh"], check=True)
    assert [path.read_bytes() for path in INSTALLED] == before
    assert prometheus('up{job="tcpexporter"}') == 1


def test_prometheus_has_the_connections_of_the_machine() -> None:
    """Connections to a port of this machine are exported by the service and scraped."""
    with Peers() as peers:
        peers.connect(7)
        query = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}}'
        eventually(lambda: prometheus(query) == 7)


def test_the_exporter_has_no_privilege() -> None:
    """After loading its program it is not root, and has no capability."""
    eventually(lambda: prometheus('tcpexporter_source_info{source="ebpf"}') == 1)
    pid = int(state("tcpexporter", "MainPID"))
    shown = status(pid, pid)
    assert "0" not in shown["Uid"] + shown["Gid"] + shown["Groups"]
    for held in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(shown[held][0], 16) == 0, held
    assert shown["NoNewPrivs"] == ["1"]
    assert shown["Seccomp"] == ["2"]


def test_the_unit_is_hardened() -> None:
    """The exposure level of systemd-analyze(1) is 2.0 or better."""
    subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--threshold=20", "tcpexporter"],
        check=True,
    )


def test_a_killed_exporter_is_restarted() -> None:
    """systemd restarts it, and it knows the pre-existing connections."""
    killed = int(state("tcpexporter", "MainPID"))
    with Peers() as peers:
        peers.connect(11)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: int(state("tcpexporter", "MainPID")) not in (0, killed))
        query = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}}'
        eventually(lambda: prometheus(query) == 11)


def get(path: str) -> str | None:
    """Return a page of the service, or None if there is none."""
    url = f"http://localhost:9690{path}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url) as page:
        text: str = page.read().decode()
        return text
    return None


def long_term(port: int) -> int:
    """Return the number of long-term connections to a port that the service reports."""
    series = f'{LONG_TERM}{{port="{port}",tcp_version="4"}}'
    lines = (get("/metrics") or "").splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith(series))


def is_ready(before: int) -> bool:
    """Return whether another process than ``before`` serves, and knows pre-existing
    connections."""
    another = int(state("tcpexporter", "MainPID")) not in (0, before)
    return another and get("/-/ready") is not None


RESTART = ("restart",)
KILL = ("kill", "--signal=KILL")


def end_by(ending: tuple[str, ...]) -> None:
    """End the service with a command, and wait until it has started again."""
    before = int(state("tcpexporter", "MainPID"))
    subprocess.run(["systemctl", *ending, "tcpexporter"], check=True)
    eventually(partial(is_ready, before))


@contextlib.contextmanager
def with_settings(*lines: str) -> Iterator[None]:
    """Restart the service with these settings, which stay until its next start."""
    SETTINGS.write_text("".join(f"{line}\n" for line in lines))
    try:
        end_by(RESTART)
        yield
    finally:
        SETTINGS.unlink()


@contextlib.contextmanager
def busy(peers: Peers) -> Iterator[None]:
    """Send data on all connections repeatedly, so that the socket tables show no age."""

    def talk() -> None:
        for client, server in peers.pairs:
            client.send(server.send(b"x") * b"x")
            client.recv(1)
            server.recv(1)

    with repeating(talk, pause_s=0.1):
        yield


@pytest.mark.parametrize(
    ("without", "endings"),
    [
        pytest.param("", (RESTART, KILL), id="pinned"),
        pytest.param("TCPEXPORTER_PIN=", (RESTART,), id="saved"),
    ],
)
def test_an_age_continues_after_a_restart(
    without: str, endings: tuple[tuple[str, ...], ...]
) -> None:
    """It is long-term from the moment at which the service is ready."""
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


def test_systemctl_reload_applies_settings() -> None:
    """The process is the same before and after, and its status does not change."""
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


SERVING = """
import os, socket, sys
if os.environ.get("LISTEN_FDS"):
    listener = socket.socket(fileno=3)
else:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
held = []
while True:
    held.append(listener.accept())
"""
"""A service that accepts connections and keeps them."""

UNITS = Path("/run/systemd/system")
SCRIPT = Path("/run/serve.py")
SERVICE = f"[Service]\nExecStart=/usr/bin/python3 {SCRIPT} "
OWNED = {
    "one.service": 7001,
    "two.service": 7002,
    "many@7003.service": 7003,
    "activated.socket": 7004,
    "mine.service": 7005,
}
"""Units, and the port of each. The last one is a user service."""


def as_user(*command: str) -> None:
    """Run a command for the service manager of root's user session."""
    environ = {**os.environ, "XDG_RUNTIME_DIR": "/run/user/0"}
    subprocess.run(command, check=True, env=environ)


@pytest.fixture
def owned() -> Iterator[None]:
    """Start the units of `OWNED`."""
    SCRIPT.write_text(SERVING)
    (UNITS / "one.service").write_text(f"{SERVICE}7001\n")
    (UNITS / "two.service").write_text(f"{SERVICE}7002\n")
    (UNITS / "many@.service").write_text(f"{SERVICE}%i\n")
    (UNITS / "activated.service").write_text(SERVICE)
    (UNITS / "activated.socket").write_text("[Socket]\nListenStream=127.0.0.1:7004\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    system = [each for each in OWNED if each != "mine.service"]
    subprocess.run(["systemctl", "start", "user@0.service", *system], check=True)
    as_user(
        *("systemd-run", "--user", "--unit=mine.service"),
        *("/usr/bin/python3", str(SCRIPT), "7005"),
    )
    yield
    as_user("systemctl", "--user", "stop", "mine.service")
    subprocess.run(["systemctl", "stop", *system, "activated.service"], check=True)


@pytest.mark.usefixtures("owned")
def test_connections_have_the_units_of_systemd() -> None:
    """A socket-activated service has the connections of its socket unit."""
    with (
        with_settings("TCPEXPORTER_LABELS=port,unit"),
        contextlib.ExitStack() as opened,
    ):
        for number, port in enumerate(OWNED.values(), start=3):
            for _ in range(number):
                eventually(partial(accepts, port))
                client = socket.create_connection(("127.0.0.1", port))
                opened.enter_context(client)
        expected = {
            f'{ESTABLISHED}{{port="{port}",unit="{unit}"}} {number}.0'
            for number, (unit, port) in enumerate(OWNED.items(), start=3)
        }
        eventually(lambda: expected <= {*(get("/metrics") or "").splitlines()})


def accepts(port: int) -> bool:
    shown = subprocess.check_output(["ss", "-Htnl", "sport", "=", f":{port}"], text=True)
    return bool(shown)


def test_root_can_unpin_the_state_of_the_service() -> None:
    """The state belongs to a user that no longer exists; the service starts
    nevertheless."""
    end_by(RESTART)
    subprocess.run(["systemctl", "stop", "tcpexporter"], check=True)
    assert list(PINNED.iterdir())
    subprocess.run([COMMAND, "--unpin", "--pin", PINNED], check=True)
    assert not PINNED.exists()
    subprocess.run(["systemctl", "start", "tcpexporter"], check=True)
    eventually(partial(is_ready, 0))
    assert list(PINNED.iterdir())
