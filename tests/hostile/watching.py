# SPDX-License-Identifier: GPL-3.0-only
"""Scrapes the exporter during an attack, and measures its memory and descriptors."""

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

from tests.hostile.clients import ADDRESSES
from tests.support import Exporter

MIB_KIB = 1024
PATIENCE_S = 15.0
"""Timeout of a scrape; the exporter drops a slow client after 10 s."""

ADDRESS = "127.0.0.1"
"""Source address of scrapers; attackers have other addresses."""


class Access(NamedTuple):
    """How an authorized client connects: TLS, name and password."""

    context: ssl.SSLContext | None = None
    name: str = ""
    password: str = ""

    def connect(self, port: int, address: str = ADDRESS) -> http.client.HTTPConnection:
        """Return a connection from this address; the first request connects it."""
        host, source = "127.0.0.1", (address, 0)
        if self.context is None:
            return http.client.HTTPConnection(host, port, PATIENCE_S, source)
        return http.client.HTTPSConnection(
            host, port, timeout=PATIENCE_S, source_address=source, context=self.context
        )

    def headers(self) -> dict[str, str]:
        encoded = base64.b64encode(f"{self.name}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {encoded}"} if self.name else {}


class AttackedExporter(Exporter):
    """An exporter that requires this access."""

    def __init__(self, access: Access, *arguments: str) -> None:
        self.access = access
        super().__init__(*arguments)

    def get(self, path: str) -> str:
        with contextlib.closing(self.access.connect(self.port)) as connection:
            return ask(connection, path, self.access)

    def used(self) -> "Used":
        """Return its current memory and descriptors."""
        process = Path(f"/proc/{self.process.pid}")
        lines = (process / "status").read_text().splitlines()
        kib = {line.split()[0]: line.split()[1] for line in lines if "kB" in line}
        return Used(
            descriptors=len(list((process / "fd").iterdir())),
            resident_mib=int(kib["VmRSS:"]) / MIB_KIB,
            peak_mib=int(kib["VmHWM:"]) / MIB_KIB,
        )

    def forget_peak(self) -> None:
        """Reset the peak of its memory: proc_pid_clear_refs(5)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


class Used(NamedTuple):
    """Resources that a process uses."""

    descriptors: int
    resident_mib: float
    peak_mib: float


def ask(connection: http.client.HTTPConnection, path: str, access: Access) -> str:
    """Return a page.

    Raises:
        OSError: the request failed, or the status is not 200.
    """
    try:
        connection.request("GET", path, headers=access.headers())
        with connection.getresponse() as response:
            page = response.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error
    if response.status != http.HTTPStatus.OK:
        raise ConnectionError(f"{response.status} {page.strip()}")
    return page


@dataclass
class Scraped:
    """Results of one scraper."""

    scrapes: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    reconnected: int = 0
    """Number of times the server had closed a kept connection."""


class Watcher:
    """Scrapes once a second in several ways, until the context ends."""

    def __init__(
        self, exporter: AttackedExporter, expected: str, first_logins: Iterable[Access]
    ) -> None:
        """Watch an exporter.

        Args:
            exporter: The exporter to scrape.
            expected: A line that each page must have.
            first_logins: Users that log in for the first time; may be empty.
        """
        self.new, self.kept, self.first_logins = Scraped(), Scraped(), Scraped()
        self.attackers_network = Scraped()
        """Results of scrapes from an attacker's address, which may fail."""
        self.descriptors = 0
        """Largest number of descriptors seen."""
        self._exporter = exporter
        self._expected = expected
        self._first_logins = first_logins
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True)
            for each in (
                self._scrape_on_new_connections,
                self._scrape_on_one_connection,
                self._scrape_from_attackers_network,
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
        return self.new, self.kept, self.first_logins

    def _scrape_on_new_connections(self) -> None:
        """Scrape on a new connection each time."""
        while self._scrape(self.new, self._connect(), self._exporter.access):
            pass

    def _scrape_on_one_connection(self) -> None:
        """Scrape on one connection, as Prometheus does."""
        connection = self._connect()
        while self._scrape(self.kept, connection, self._exporter.access, keeps=True):
            pass
        connection.close()

    def _scrape_from_attackers_network(self) -> None:
        """Scrape from an address of the attackers, on a new connection each time."""
        access = self._exporter.access
        while self._scrape(
            self.attackers_network,
            access.connect(self._exporter.port, ADDRESSES[0]),
            access,
        ):
            pass

    def _log_in(self) -> None:
        """Log in each user for the first time, from a network of its own."""
        for number, access in enumerate(self._first_logins, start=1):
            connection = access.connect(self._exporter.port, f"127.0.2.{number}")
            if not self._scrape(self.first_logins, connection, access):
                return

    def _connect(self) -> http.client.HTTPConnection:
        return self._exporter.access.connect(self._exporter.port)

    def _scrape(
        self,
        scraped: Scraped,
        connection: http.client.HTTPConnection,
        access: Access,
        *,
        keeps: bool = False,
    ) -> bool:
        """Scrape once and wait for the next second; return whether to continue."""
        began_s = time.monotonic()
        scraped.scrapes += 1
        try:
            page = self._ask(scraped, connection, access)
            if self._expected not in page:
                scraped.failures.append("a page lacks the expected line")
        except OSError as error:
            scraped.failures.append(f"after {time.monotonic() - began_s:.2f} s: {error}")
            connection.close()
        if not keeps:
            connection.close()
        took_s = time.monotonic() - began_s
        scraped.slowest_s = max(scraped.slowest_s, took_s)
        return not self._ending.wait(max(0, 1 - took_s))

    def _ask(
        self, scraped: Scraped, connection: http.client.HTTPConnection, access: Access
    ) -> str:
        was_kept = connection.sock is not None
        try:
            return ask(connection, "/metrics", access)
        except ConnectionError:
            if not was_kept:
                raise
        # Go's HTTP client, which Prometheus uses, also retries on a closed kept connection.
        scraped.reconnected += 1
        connection.close()
        return ask(connection, "/metrics", access)

    def _count(self) -> None:
        while not self._ending.wait(0.1):
            self.descriptors = max(self.descriptors, self._exporter.used().descriptors)
