# SPDX-License-Identifier: GPL-3.0-only
"""Well-behaved scrapers, and what the exporter takes meanwhile."""

import base64
import contextlib
import http.client
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from tests.hostile.crowd import ADDRESSES
from tests.support import Exporter

MIB_KIB = 1024
PATIENCE_S = 15.0
"""After that a scrape has failed; the exporter itself gives up after 10."""

ADDRESS = "127.0.0.1"
"""Of those who scrape; the attackers are elsewhere."""


class Door(NamedTuple):
    """What somebody who may come in has."""

    context: ssl.SSLContext | None = None
    name: str = ""
    password: str = ""

    def connect(self, port: int, address: str = ADDRESS) -> http.client.HTTPConnection:
        """A connection from this address, which is made with the first request."""
        host, source = "127.0.0.1", (address, 0)
        if self.context is None:
            return http.client.HTTPConnection(host, port, PATIENCE_S, source)
        return http.client.HTTPSConnection(
            host, port, timeout=PATIENCE_S, source_address=source, context=self.context
        )

    def headers(self) -> dict[str, str]:
        told = base64.b64encode(f"{self.name}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {told}"} if self.name else {}


class Besieged(Exporter):
    """An exporter that is asked through a door."""

    def __init__(self, door: Door, *arguments: str) -> None:
        self.door = door
        super().__init__(*arguments)

    def get(self, path: str) -> str:
        with contextlib.closing(self.door.connect(self.port)) as connection:
            return ask(connection, path, self.door)

    def used(self) -> "Used":
        """What it has now."""
        process = Path(f"/proc/{self.process.pid}")
        lines = (process / "status").read_text().splitlines()
        kib = {line.split()[0]: line.split()[1] for line in lines if "kB" in line}
        return Used(
            descriptors=len(list((process / "fd").iterdir())),
            resident_mib=int(kib["VmRSS:"]) / MIB_KIB,
            peak_mib=int(kib["VmHWM:"]) / MIB_KIB,
        )

    def forget_peak(self) -> None:
        """Have the peak of its memory begin anew: proc_pid_clear_refs(5)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


class Used(NamedTuple):
    """What a process has of the host."""

    descriptors: int
    resident_mib: float
    peak_mib: float


def ask(connection: http.client.HTTPConnection, path: str, door: Door) -> str:
    """One page.

    Raises:
        OSError: there is none, and why.
    """
    try:
        connection.request("GET", path, headers=door.headers())
        with connection.getresponse() as response:
            page = response.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error
    if response.status != http.HTTPStatus.OK:
        raise ConnectionError(f"{response.status} {page.strip()}")
    return page


@dataclass
class Scraped:
    """What came of somebody's scrapes."""

    scrapes: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    reconnected: int = 0
    """How often a connection that was kept had been closed."""


class Watcher:
    """Scrapes once a second in each way, and sees what that takes, until the end."""

    def __init__(
        self, exporter: Besieged, expected: str, newcomers: Iterable[Door]
    ) -> None:
        """Watch an exporter.

        Args:
            exporter: Which one.
            expected: A line that each page has.
            newcomers: Who log in for the first time; there may be none.
        """
        self.new, self.kept, self.newcomers = Scraped(), Scraped(), Scraped()
        self.beside = Scraped()
        """Not among those who are judged."""
        self.descriptors = 0
        """The most that it had."""
        self._exporter = exporter
        self._expected = expected
        self._doors = newcomers
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True)
            for each in (
                self._scrape_anew,
                self._scrape_on,
                self._scrape_beside,
                self._log_in,
                self._count,
            )
        ]

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for each in self._threads:
            each.join()

    @property
    def judged(self) -> tuple[Scraped, ...]:
        return self.new, self.kept, self.newcomers

    def _scrape_anew(self) -> None:
        """On a new connection each time."""
        while self._scrape(self.new, self._connect(), self._exporter.door):
            pass

    def _scrape_on(self) -> None:
        """On one connection, as Prometheus does."""
        connection = self._connect()
        while self._scrape(self.kept, connection, self._exporter.door, keeps=True):
            pass
        connection.close()

    def _scrape_beside(self) -> None:
        """From an address that attackers have, too, on a new connection each time."""
        door = self._exporter.door
        while self._scrape(
            self.beside, door.connect(self._exporter.port, ADDRESSES[0]), door
        ):
            pass

    def _log_in(self) -> None:
        """With a password that was not checked before, each from where nobody else is."""
        for number, door in enumerate(self._doors, start=1):
            connection = door.connect(self._exporter.port, f"127.0.2.{number}")
            if not self._scrape(self.newcomers, connection, door):
                return

    def _connect(self) -> http.client.HTTPConnection:
        return self._exporter.door.connect(self._exporter.port)

    def _scrape(
        self,
        scraped: Scraped,
        connection: http.client.HTTPConnection,
        door: Door,
        *,
        keeps: bool = False,
    ) -> bool:
        """Once, and wait until the second is over; whether to go on."""
        began_s = time.monotonic()
        scraped.scrapes += 1
        try:
            page = self._ask(scraped, connection, door)
            if self._expected not in page:
                scraped.failures.append("a page is not what it should be")
        except OSError as error:
            scraped.failures.append(f"after {time.monotonic() - began_s:.2f} s: {error}")
            connection.close()
        if not keeps:
            connection.close()
        took_s = time.monotonic() - began_s
        scraped.slowest_s = max(scraped.slowest_s, took_s)
        return not self._ending.wait(max(0, 1 - took_s))

    def _ask(
        self, scraped: Scraped, connection: http.client.HTTPConnection, door: Door
    ) -> str:
        was_kept = connection.sock is not None
        try:
            return ask(connection, "/metrics", door)
        except ConnectionError:
            if not was_kept:
                raise
        # As Go does, of which Prometheus is: what has been closed is no failure.
        scraped.reconnected += 1
        connection.close()
        return ask(connection, "/metrics", door)

    def _count(self) -> None:
        while not self._ending.wait(0.1):
            self.descriptors = max(self.descriptors, self._exporter.used().descriptors)
