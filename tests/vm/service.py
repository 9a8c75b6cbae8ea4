# SPDX-License-Identifier: GPL-3.0-only
"""The machine of ``vagrant/``, seen from within: run by `make vm-test` in a guest."""

import json
import os
import signal
import subprocess
import urllib.request
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from tests.support import ESTABLISHED, Peers, eventually

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


def test_a_killed_exporter_is_started_again() -> None:
    """systemd does so, and the new one knows the connections from before."""
    killed = int(state("tcpexporter", "MainPID"))
    with Peers() as peers:
        peers.connect(11)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: int(state("tcpexporter", "MainPID")) not in (0, killed))
        query = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}}'
        eventually(lambda: prometheus(query) == 11)
