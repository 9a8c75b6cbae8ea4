# SPDX-License-Identifier: GPL-3.0-only
"""Starts and scrapes the measured exporter, which is the installed command."""

import contextlib
import http.client
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from tests.support import Exporter

COMMAND = (str(Path(sys.executable).with_name("tcpexporter")),)
BPF_FS = Path("/sys/fs/bpf")
KEPT_S = 60.0
"""After this time without a request, in seconds, a scraper connects again: tcpexporter
closes idle connections after 75 s."""
CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
POLL_SHARE = 0.02
"""Pause between two readiness requests, as a share of the time since the start. A request
delays the exporter, so there must not be many."""
DEADLINE_S = 60.0

AS_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
}


class NoNumberError(Exception):
    """Raised if a method gives no number. The message follows "not measured, because"."""


class Started(NamedTuple):
    """An exporter that is ready."""

    exporter: Exporter
    took_s: float
    """Time from start to ready."""


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Started]:
    """Start an exporter in this network namespace, and wait until it is ready.

    Raises:
        RuntimeError: the exporter ended before it was ready; the message has its output.
        NoNumberError: the exporter is not ready within the time limit.
    """
    start_s = time.perf_counter()
    with Exporter(*arguments, command=COMMAND, wait=False) as exporter:
        try:
            _wait_until_ready(exporter, start_s)
            yield Started(exporter, time.perf_counter() - start_s)
        except Exception as error:
            if exporter.process.poll() is None:
                raise
            code, complaints = exporter.stop()
            raise RuntimeError(f"the exporter ended with {code}:\n{complaints}") from error


def _wait_until_ready(exporter: Exporter, start_s: float) -> None:
    while not _is_ready(exporter):
        if exporter.process.poll() is not None:
            raise RuntimeError("the exporter has ended")
        waited_s = time.perf_counter() - start_s
        if waited_s > DEADLINE_S:
            raise NoNumberError(f"it was not ready within {DEADLINE_S:.0f} s")
        time.sleep(POLL_SHARE * waited_s)


def _is_ready(exporter: Exporter) -> bool:
    with contextlib.closing(_connection(exporter.port)) as connection:
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False


class Scraper:
    """Requests /metrics repeatedly on one connection, as Prometheus does.

    It uses a plain socket: its own time is part of each figure, and http.client would add
    0.1 to 0.2 ms.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket()
        """Connected by the first request: tcpexporter drops clients without a request."""
        self._used_s = -math.inf

    def _connect(self) -> None:
        self._socket.close()
        address = ("127.0.0.1", self._port)
        self._socket = socket.create_connection(address, timeout=DEADLINE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, headers: Mapping[str, str] = {}) -> bytes:
        """Return the exposition.

        Raises:
            RuntimeError: the status is not 200; the message has the response.
            NoNumberError: there is no response within the time limit.
        """
        if time.monotonic() - self._used_s > KEPT_S:
            self._connect()
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        request = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{''.join(lines)}\r\n"
        try:
            self._socket.sendall(request.encode())
            head, page = self._receive()
            self._used_s = time.monotonic()
        except TimeoutError as error:
            raise NoNumberError(f"it gave no number within {DEADLINE_S:.0f} s") from error
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"/metrics: {head.decode()} {page.decode()}")
        return page

    def _receive(self) -> tuple[bytes, bytes]:
        """Return the head and the body of a response."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        if length := CONTENT_LENGTH.search(head):
            while len(body) < int(length[1]):
                body += self._more()
            return head, body
        while not body.endswith(b"\r\n0\r\n\r\n"):
            body += self._more()
        return head, _joined(body)

    def _more(self) -> bytes:
        received = self._socket.recv(1 << 20)
        if not received:
            raise RuntimeError("/metrics: the exporter has closed the connection")
        return received

    def values(self) -> dict[tuple[str, str], float]:
        """Scrape, and return values by metric name and port ("" if there is no port)."""
        return values(self.get())

    def reconciliations(self) -> int:
        """Scrape, and return how many reconciliations the exporter has completed."""
        return int(self.values()["tcpexporter_reconciliations_total", ""])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _joined(chunked: bytes) -> bytes:
    """Return a body whose chunks have sizes before them (RFC 9112, section 7.1)."""
    found = []
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        chunked = rest[int(size, 16) + 2 :]
    return b"".join(found)


def values(page: bytes) -> dict[tuple[str, str], float]:
    """Return values of an exposition by metric name and port ("" if there is no port).

    With --netns all, only those of the exporter's own network namespace are returned.
    """
    return {
        (sample.name, sample.labels.get("port", "")): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.labels.get("netns", "self") == "self"
    }


def wait_for_reconciliation(exporter: Exporter) -> None:
    """Wait until the first reconciliation after the start has ended.

    Raises:
        NoNumberError: it does not end within the time limit.
    """
    until_s = time.monotonic() + DEADLINE_S
    with Scraper(exporter.port) as scraper:
        while not scraper.reconciliations():
            if time.monotonic() > until_s:
                raise NoNumberError(f"it did not reconcile within {DEADLINE_S:.0f} s")
            time.sleep(0.1)


@contextlib.contextmanager
def pin_directory() -> Iterator[Path]:
    """Yield a directory for --pin; at the end remove what was pinned there."""
    path = BPF_FS / f"tcpexporter-bench-{os.getpid()}"
    try:
        yield path
    finally:
        subprocess.run([*COMMAND, "--unpin", "--pin", path], check=True)


def _connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
