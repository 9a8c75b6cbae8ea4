# SPDX-License-Identifier: GPL-3.0-only
"""Serves pages over real sockets on loopback, and sends requests to them."""

import asyncio
import contextlib
import errno
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tcpexporter.web import pages, server

LOOPBACK = "127.0.0.1"


PATIENCE_S = 10
"""Time limit for steps that should be immediate."""


LANDING = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"


Start = Callable[..., int]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Flaky(Collector):
    """A collector that raises ``error`` if it is set."""

    error: Exception | None = None
    collections = 0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self.collections += 1
        if self.error:
            raise self.error
        yield GaugeMetricFamily("connections", "How many.", 7)


class Held(Collector):
    """A collector whose collections wait for ``go_on``; the value is their number."""

    collections = 0

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self.collections += 1
        number = self.collections
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)
        yield GaugeMetricFamily("connections", "How many.", number)


def make_app(
    *collectors: Collector,
    ready: Callable[[], str | None] = lambda: None,
    settings: Mapping[str, str] | None = None,
) -> pages.App:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return pages.App(registry, ready=ready, settings=settings or {}, version="1.2.3")


@contextlib.contextmanager
def serving(app: pages.App, sockets: list[socket.socket]) -> Iterator[None]:
    running_server = server.Server(app)
    loops: list[asyncio.AbstractEventLoop] = []
    running = threading.Event()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        running.set()
        await running_server.serve(sockets)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert running.wait(PATIENCE_S)
    try:
        yield
    finally:
        loops[0].call_soon_threadsafe(running_server.stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def ask(
    port: int, path: str, method: str = "GET", *, host: str = LOOPBACK, **headers: str
) -> Answer:
    """Send one request on a new connection; ``accept_encoding`` is a header."""
    client = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    with contextlib.closing(client):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        client.request(method, path, headers=names)
        response = client.getresponse()
        return Answer(response.status, response.headers, response.read())


def dial(port: int, source: str = LOOPBACK) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), PATIENCE_S, (source, 0))


def read_until(sock: socket.socket, end: bytes) -> None:
    received = b""
    while not received.endswith(end):
        chunk = sock.recv(65536)
        assert chunk, received
        received += chunk


def read_all(sock: socket.socket, enough: int | None = None) -> bytes:
    """Read until the server closes the connection, or ``enough`` bytes have arrived."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while (enough is None or len(received) < enough) and (chunk := sock.recv(65536)):
            received += chunk
    return received


def dropped_while_sending(sock: socket.socket, data: bytes, *, every_s: float) -> bool:
    """Return whether the server closes a connection on which the client keeps sending."""
    sock.settimeout(every_s)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            sock.sendall(data)
            if not sock.recv(1):
                return True
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return True
    return False


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


def until_refused(sock: socket.socket) -> bool:
    """Return whether the server resets a connection that the client does not read."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET:
            return True
        time.sleep(0.05)
    return False


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def statuses(received: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"^HTTP/1.1 (\d+) ", received, re.MULTILINE)]
