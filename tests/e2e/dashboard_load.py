# SPDX-License-Identifier: GPL-3.0-only
"""A real exporter under load, and a real Prometheus that scrapes it, for the dashboards."""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.support import Command, Prometheus
from tests.kernel.helpers.cgroups import new_cgroup
from tests.kernel.test_owners import entered
from tests.support import Peers, free_port, repeating

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/tcpexporter.rules.yml"

SERVICES = (("nginx.service", 31), ("chat.service", 17), ("postgresql.service", 5))
"""Units, and the connections that each has at first."""

FLAGS = (
    *("--labels", "port,tcp_version,remote_port,unit", "--direction", "all"),
    *("--histograms", "--buckets", "1s,2s,5s,10s,30s,1m", "--duration", "1"),
    *("--reconcile-interval", "2", "--max-connections", "1000"),
)


class _Load:
    """Opens and closes connections of the services; some attempts fail."""

    def __init__(self, services: list[Peers]) -> None:
        self._services = services
        self._turns = itertools.count()
        self._refusing = free_port()

    def step(self) -> None:
        turn = next(self._turns)
        for peers in self._services[:2]:
            # The number of connections rises and falls slowly.
            for at in range(3 if turn % 100 < 50 else 1):
                _connect(peers, f"127.0.0.{2 + (turn + at) % 23}")
            for _ in range(min(2, len(peers.pairs) - 5)):
                # Not the oldest or youngest ones: lifetimes differ.
                for end in peers.pairs.pop(turn * 7919 % len(peers.pairs)):
                    end.close()
        if turn % 3 == 0:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self._refusing))


def _connect(peers: Peers, client: str) -> None:
    """Open a connection from an address of the loopback network."""
    target = peers.listener.getsockname()
    connected = socket.create_connection(target, source_address=(client, 0))
    peers.pairs.append((connected, peers.listener.accept()[0]))


@contextlib.contextmanager
def scraped_under_load(
    directory: Path, duration_s: float, interval_s: int = 1
) -> Iterator[Prometheus]:
    """Run the load and the scrapes for a time; yield the Prometheus while they continue."""
    with contextlib.ExitStack() as opened:
        services = []
        for unit, count in SERVICES:
            with entered(opened.enter_context(new_cgroup(unit))):
                peers = opened.enter_context(Peers())
            peers.connect(count)
            services.append(peers)
        database = f"database=remote=127.0.0.1:{services[-1].port}"
        exporter = opened.enter_context(
            Command(
                *FLAGS,
                *("--expect", database),
                *("--expect", "queue=remote=192.0.2.7:5672"),
            )
        )
        opened.enter_context(repeating(_Load(services).step, pause_s=0.3))
        prometheus = opened.enter_context(
            Prometheus(
                directory, exporter.target, interval_s=interval_s, rules=RULES.read_text()
            )
        )
        time.sleep(duration_s)
        yield prometheus
