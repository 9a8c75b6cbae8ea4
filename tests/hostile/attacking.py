# SPDX-License-Identifier: GPL-3.0-only
"""Runs an exporter under attack, and measures it before, during and after."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bcrypt

from tcpexporter.web.http_clients import MAX_CONNECTIONS
from tcpexporter.web.server import ACCEPTED_AT_ONCE
from tests import pki
from tests.hostile.attacks import ATTACKS, Attack
from tests.hostile.clients import Done
from tests.hostile.watching import Access, AttackedExporter, Used, Watcher
from tests.support import ESTABLISHED, LONG_TERM, Peers, eventually

PORTS = 1_000
"""Ports that have series: in two IP versions they reach the default limit of 2,000
series."""

CONNECTIONS = 7

FIRST_LOGINS = 60
PASSWORD = "wonderland"  # noqa: S105

MOST_SCRAPE_S = 1.0
MOST_MIB = 128.0
MOST_GROWTH_MIB = 24.0
"""Memory growth allowed for one attack; a second attack of the same kind adds almost
none."""
MOST_DESCRIPTORS = MAX_CONNECTIONS + 4 * ACCEPTED_AT_ONCE
"""Descriptors allowed in addition to those before the attack. Evicted clients are closed
two turns of the event loop later."""

SETTLED_S = 20.0
"""Time allowed for recovery: the exporter drops clients that an attack leaves after 10
s."""


@dataclass(frozen=True)
class Figures:
    """Results of an attack."""

    attack: Attack
    done: Done
    watched: Watcher
    before: Used
    peak_mib: float
    after: Used
    settled_s: float
    """Time from the end of the attack until no more descriptors were open than before."""
    is_same: bool
    """Whether the page has the same connections as before."""

    @property
    def slowest_s(self) -> float:
        return max(each.slowest_s for each in self.watched.judged)

    @property
    def growth_mib(self) -> float:
        return self.after.resident_mib - self.before.resident_mib

    @property
    def problems(self) -> list[str]:
        """List the limits that the exporter has exceeded, except time limits."""
        found = [each for scraped in self.watched.judged for each in scraped.failures]
        if not self.done.requests:
            found.append("no request was sent: the attack did not happen")
        if self.peak_mib > MOST_MIB:
            found.append(f"it used {self.peak_mib:.0f} MiB")
        if self.watched.descriptors > self.before.descriptors + MOST_DESCRIPTORS:
            found.append(f"it had open {self.watched.descriptors} descriptors")
        if self.after.descriptors > self.before.descriptors:
            found.append(f"{self.after.descriptors} descriptors are still open")
        if self.growth_mib > MOST_GROWTH_MIB:
            found.append(f"its memory has grown by {self.growth_mib:.1f} MiB")
        if not self.is_same:
            found.append("its page has changed")
        return found

    @property
    def delays(self) -> list[str]:
        """List the time limits that the exporter has exceeded."""
        if self.slowest_s < MOST_SCRAPE_S:
            return []
        return [f"a scrape took {self.slowest_s:.2f} s"]


@contextlib.contextmanager
def start_exporter(directory: Path, web: str, peers: Peers) -> Iterator[AttackedExporter]:
    """Start an exporter with the longest default page and this web configuration."""
    ports = f"1-{PORTS},{peers.port}"
    arguments = ["--source", "ebpf", "--port", ports, "--duration", "1"]
    access = Access()
    if web:
        access = _access(web)
        config = pki.TLS if web == "tls" else _users(access, *first_logins())
        arguments += ["--web-config", pki.write_web(directory, config)]
    with AttackedExporter(access, *arguments) as exporter:
        eventually(lambda: exporter.long_term(peers.port) == CONNECTIONS)
        yield exporter


def _access(web: str) -> Access:
    if web == "tls":
        return Access(pki.client_context())
    return Access(name="alice", password=PASSWORD)


def first_logins() -> Iterator[Access]:
    """Yield users that have not logged in yet."""
    for number in range(FIRST_LOGINS):
        yield Access(name=f"user-{number}", password=PASSWORD)


def _users(*accesses: Access) -> str:
    # The cost that `htpasswd -nBC 10` uses: 70 ms for a check.
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    lines = "".join(f"  {each.name}: {hashed}\n" for each in accesses)
    return f"basic_auth_users:\n{lines}"


def attack(
    exporter: AttackedExporter,
    peers: Peers,
    name: str,
    *,
    seconds: float,
    clients: int | None = None,
    first_logins: Iterable[Access] = (),
) -> Figures:
    """Run an attack for this time; ``clients`` overrides its number of clients."""
    shape = ATTACKS[name]
    counted = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}} {CONNECTIONS}.0\n'
    page = _connections(exporter)
    before = exporter.used()
    exporter.forget_peak()
    with Watcher(exporter, counted, first_logins) as watched:
        done = _unleash(exporter.port, name, clients or shape.clients, seconds)
    peak_mib = exporter.used().peak_mib
    is_same = _connections(exporter) == page
    settled_s = _settle(exporter, before)
    return Figures(
        attack=shape,
        done=done,
        watched=watched,
        before=before,
        peak_mib=peak_mib,
        after=exporter.used(),
        settled_s=settled_s,
        is_same=is_same,
    )


def _unleash(port: int, name: str, clients: int, seconds: float) -> Done:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "tests.hostile.attacks", name, str(port)),
            *("--clients", str(clients), "--seconds", str(seconds)),
        ],
        check=True,
        stdout=subprocess.PIPE,
    )
    return Done(**json.loads(ended.stdout))


def _settle(exporter: AttackedExporter, before: Used) -> float:
    """Wait until no more descriptors are open than before; return the time in seconds."""
    began_s = time.monotonic()
    while exporter.used().descriptors > before.descriptors:
        if time.monotonic() > began_s + SETTLED_S:
            break
        time.sleep(0.1)
    return time.monotonic() - began_s


def _connections(exporter: AttackedExporter) -> Sequence[str]:
    page = exporter.get("/metrics")
    return [line for line in page.splitlines() if line.startswith((ESTABLISHED, LONG_TERM))]
