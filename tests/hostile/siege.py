# SPDX-License-Identifier: GPL-3.0-only
"""An exporter under attack, and what it is afterwards."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bcrypt

from tcpexporter.web.connection import MAX_CONNECTIONS
from tcpexporter.web.server import ACCEPTED_AT_ONCE
from tests import pki
from tests.hostile.attacks import ATTACKS, Attack
from tests.hostile.crowd import Done
from tests.hostile.watching import Besieged, Door, Used, Watcher
from tests.support import ESTABLISHED, LONG_TERM, Peers, eventually

PORTS = 1_000
"""That have series: both IP versions make the 2,000 that a page has at most by default."""

CONNECTIONS = 7

NEWCOMERS = 60
PASSWORD = "wonderland"  # noqa: S105

MOST_SCRAPE_S = 1.0
MOST_MIB = 128.0
MOST_GROWTH_MIB = 24.0
"""Once: a second crowd of the same kind adds next to nothing."""
MOST_DESCRIPTORS = MAX_CONNECTIONS + 4 * ACCEPTED_AT_ONCE
"""On top of those before: who is turned away is closed two turns of the loop later."""

SETTLED_S = 20.0
"""Until it must be as before: a client that the attackers left is dropped after 10 s."""


@dataclass(frozen=True)
class Figures:
    """What came of an attack."""

    attack: Attack
    done: Done
    watched: Watcher
    before: Used
    peak_mib: float
    after: Used
    settled_s: float
    """How long after the attack it had its descriptors back."""
    is_same: bool
    """Whether the page is that of before."""

    @property
    def slowest_s(self) -> float:
        return max(each.slowest_s for each in self.watched.judged)

    @property
    def growth_mib(self) -> float:
        return self.after.resident_mib - self.before.resident_mib

    @property
    def problems(self) -> list[str]:
        """Why the exporter does not withstand, whatever the time."""
        found = [each for scraped in self.watched.judged for each in scraped.failures]
        if not self.done.requests:
            found.append("nobody attacked: this proves nothing")
        if self.peak_mib > MOST_MIB:
            found.append(f"it took {self.peak_mib:.0f} MiB")
        if self.watched.descriptors > self.before.descriptors + MOST_DESCRIPTORS:
            found.append(f"it had {self.watched.descriptors} descriptors")
        if self.after.descriptors > self.before.descriptors:
            found.append(f"{self.after.descriptors} descriptors are left")
        if self.growth_mib > MOST_GROWTH_MIB:
            found.append(f"it has grown by {self.growth_mib:.1f} MiB")
        if not self.is_same:
            found.append("its page is another one afterwards")
        return found

    @property
    def delays(self) -> list[str]:
        """What took too long."""
        if self.slowest_s < MOST_SCRAPE_S:
            return []
        return [f"a scrape took {self.slowest_s:.2f} s"]


@contextlib.contextmanager
def besieged(directory: Path, web: str, peers: Peers) -> Iterator[Besieged]:
    """An exporter with as long a page as there is by default, guarded in this way."""
    ports = f"1-{PORTS},{peers.port}"
    arguments = ["--source", "ebpf", "--port", ports, "--duration", "1"]
    door = Door()
    if web:
        door = _door(web)
        config = pki.TLS if web == "tls" else _users(door, *newcomers())
        arguments += ["--web-config", pki.write_web(directory, config)]
    with Besieged(door, *arguments) as exporter:
        eventually(lambda: exporter.long_term(peers.port) == CONNECTIONS)
        yield exporter


def _door(web: str) -> Door:
    if web == "tls":
        return Door(pki.client_context())
    return Door(name="alice", password=PASSWORD)


def newcomers() -> Iterator[Door]:
    """Users who have not been there, one after another."""
    for number in range(NEWCOMERS):
        yield Door(name=f"newcomer-{number}", password=PASSWORD)


def _users(*doors: Door) -> str:
    # As costly as what `htpasswd -B` makes nowadays: 70 ms a check.
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    lines = "".join(f"  {each.name}: {hashed}\n" for each in doors)
    return f"basic_auth_users:\n{lines}"


def attack(
    exporter: Besieged,
    peers: Peers,
    name: str,
    *,
    seconds: float,
    clients: int | None = None,
    guests: Iterable[Door] = (),
) -> Figures:
    """Attack for so long, by as many as the attack has unless told otherwise."""
    shape = ATTACKS[name]
    counted = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}} {CONNECTIONS}.0\n'
    page = _connections(exporter)
    before = exporter.used()
    exporter.forget_peak()
    with Watcher(exporter, counted, guests) as watched:
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


def _settle(exporter: Besieged, before: Used) -> float:
    """Wait until it has no more descriptors than before; how long that took."""
    began_s = time.monotonic()
    while exporter.used().descriptors > before.descriptors:
        if time.monotonic() > began_s + SETTLED_S:
            break
        time.sleep(0.1)
    return time.monotonic() - began_s


def _connections(exporter: Besieged) -> Sequence[str]:
    page = exporter.get("/metrics")
    return [line for line in page.splitlines() if line.startswith((ESTABLISHED, LONG_TERM))]
