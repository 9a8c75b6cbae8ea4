# SPDX-License-Identifier: GPL-3.0-only
"""The HTTP server, over real sockets on loopback."""

import asyncio
import base64
import contextlib
import errno
import gc
import gzip
import hashlib
import http.client
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from tcpexporter.errors import ServerError, SourceError
from tcpexporter.host import malloc as memory
from tcpexporter.web import server

LOOPBACK = "127.0.0.1"
PATIENCE_S = 10
"""Until a test gives up on what should happen at once."""

LANDING = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"

Start = Callable[..., int]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Flaky(Collector):
    """A collector that has trouble when told."""

    trouble: Exception | None = None
    collections = 0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self.collections += 1
        if self.trouble:
            raise self.trouble
        yield GaugeMetricFamily("connections", "How many.", 7)


class Held(Collector):
    """A collector whose first collection goes on until told; each says which it is."""

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
    settings: Mapping[str, object] | None = None,
) -> server.App:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return server.App(registry, ready=ready, settings=settings or {}, version="1.2.3")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Serve in a thread, at a free port, until the end of the test."""
    # Signals are for the main thread.
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    with contextlib.ExitStack() as running:

        def start_one(app: server.App, address: str | None = LOOPBACK) -> int:
            sockets = server.listen(address, 0)
            port: int = sockets[0].getsockname()[1]
            running.enter_context(serving(app, sockets))
            return port

        yield start_one


@contextlib.contextmanager
def serving(app: server.App, sockets: list[socket.socket]) -> Iterator[None]:
    uvicorn_server = server._Server(server._config(app))
    loops: list[asyncio.AbstractEventLoop] = []
    running = threading.Event()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        running.set()
        await uvicorn_server.serve(sockets)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert running.wait(PATIENCE_S)
    try:
        yield
    finally:
        loops[0].call_soon_threadsafe(uvicorn_server.stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def ask(
    port: int, path: str, method: str = "GET", *, host: str = LOOPBACK, **headers: str
) -> Answer:
    """Send one request on a connection of its own; ``accept_encoding`` is a header, too."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=names)
        response = connection.getresponse()
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
    """All that comes until the server closes, within PATIENCE_S, or that is enough."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while (enough is None or len(received) < enough) and (chunk := sock.recv(65536)):
            received += chunk
    return received


def dropped_while_sending(sock: socket.socket, data: bytes, *, every_s: float) -> bool:
    """Whether the server closes a connection that keeps on sending."""
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


# The pages


def test_text_format(start: Start) -> None:
    """A client that asks for nothing in particular gets the text format."""
    answer = ask(start(make_app(Flaky())), "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    (family,) = parse_text(answer.body.decode())
    assert [(s.name, s.value) for s in family.samples] == [("connections", 7)]


def test_openmetrics_format(start: Start) -> None:
    """What Prometheus asks for gets OpenMetrics, by its parser's judgement too."""
    wanted = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = ask(start(make_app(Flaky())), "/metrics", accept=wanted)
    assert answer.headers["content-type"].startswith(
        "application/openmetrics-text; version=1"
    )
    (family,) = parse_openmetrics(answer.body.decode())  # type: ignore[no-untyped-call]
    assert [(s.name, s.value) for s in family.samples] == [("connections", 7)]


def test_accept_header_of_nonsense(start: Start) -> None:
    """A version that is no number gets metrics, not a fault."""
    wanted = "application/openmetrics-text;version=x"
    answer = ask(start(make_app(Flaky())), "/metrics", accept=wanted)
    assert (answer.status, b"connections 7" in answer.body) == (200, True)


def test_gzip(start: Start) -> None:
    """A client that can unpack gzip gets the same, packed, and its length."""
    port = start(make_app(Flaky()))
    plain = ask(port, "/metrics")
    packed = ask(port, "/metrics", accept_encoding="deflate, gzip;q=0.8")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["content-length"] == str(len(packed.body))
    assert gzip.decompress(packed.body) == plain.body


def test_names(start: Start) -> None:
    """name[] chooses metrics, also of a collector that has not said what it collects."""
    port = start(make_app(Flaky()))
    for query in (
        "name[]=connections",
        "name%5B%5D=%63onnections",
        "name[]=x&name[]=connections",
    ):
        assert b"connections 7" in ask(port, f"/metrics?{query}").body
    assert ask(port, "/metrics?name[]=others", accept_encoding="gzip").body == b""


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_vary(start: Start, method: str) -> None:
    """A cache is told which headers of a request chose the response."""
    port = start(make_app(Flaky()))
    for encoding in ("", "gzip"):
        answer = ask(port, "/metrics", method, accept_encoding=encoding)
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
    assert ask(port, "/metrics?name[]=x", method).headers["vary"] == "Accept"
    assert "vary" not in ask(port, "/", method).headers


def test_accept_in_several_lines(start: Start) -> None:
    """Header lines of one name are one list, however the name is spelt."""
    with dial(start(make_app(Flaky()))) as sock:
        sock.sendall(
            b"GET /metrics HTTP/1.1\r\nHost: x\r\nACCEPT: text/plain;q=0.5\r\n"
            b"accept: application/openmetrics-text\r\nAccept-Encoding: gzip\r\n"
            b"accept-encoding: gzip;q=0.1, identity;q=0.2, *;q=0\r\n\r\n"
        )
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert b"\r\ncontent-type: application/openmetrics-text; version=1.0.0;" in answer
    assert b"\r\ncontent-encoding: gzip\r\n" in answer


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy", "/-/ready", "/nowhere"])
def test_head(start: Start, path: str) -> None:
    """HEAD gets the headers of GET and no body; both say the length and the date."""
    port = start(make_app(Flaky()))
    got = ask(port, path)
    with dial(port) as sock:
        sock.sendall(
            f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {got.status} ".encode())
    assert f"content-length: {len(got.body)}\r\n".encode() in head + b"\r\n"
    assert got.headers["content-length"] == str(len(got.body))
    assert got.headers["date"]
    assert "server" not in got.headers
    assert body == b""


@pytest.mark.parametrize(
    "path",
    [
        *("/nowhere", "/metrics/", "/metrics%2F", "/METRICS", "/favicon.ico", "/-"),
        *("/metrics;x", "/metrics%3Fx", "/metrics%00", "/metrics%23"),
    ],
)
def test_no_such_page(start: Start, path: str) -> None:
    """No path but ours has anything."""
    assert ask(start(make_app()), path).status == 404


@pytest.mark.parametrize(
    ("target", "status", "where"),
    [
        ("/metrics?", 200, None),
        ("/metrics?a=//b/../c", 200, None),
        ("/%6Detrics", 200, None),
        ("http://host:9690/metrics", 200, None),
        ("HTTP://alice@[::1]:9690/metrics?a=b", 200, None),
        ("//metrics", 301, "/metrics"),
        ("///host/metrics?a=%2F&b", 301, "/host/metrics?a=%2F&b"),
        ("/./metrics", 301, "/metrics"),
        ("/a/%2e%2e/metrics", 301, "/metrics"),
        ("/a%2F..%2Fmetrics", 301, "/metrics"),
        ("/../metrics//", 301, "/metrics/"),
        ("/metrics/..", 301, "/"),
        ("//%0D%0AX:y%5c%C3%A9%3F", 301, "/%0D%0AX:y%5C%C3%A9%3F"),
        ("http://host:9690", 301, "/"),
        ("http://host?a=b", 301, "/?a=b"),
        ("http://host//metrics", 301, "/metrics"),
        ("*", 400, None),
        ("host:9690", 400, None),
        ("metrics", 400, None),
        ("?a", 400, None),
        ("/metrics%zz", 400, None),
        ("http://host:port/metrics", 400, None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_targets(
    start: Start, method: str, target: str, status: int, where: str | None
) -> None:
    """Each gets what node_exporter 1.5 answers to it, but 400 instead of a redirect for
    the name of a host alone. A fault of this kind fails scrapes through a proxy.
    """
    port = start(make_app(Flaky()))
    with dial(port) as sock:
        sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert re.findall(rb"\r\nlocation: (.*)", head) == ([where.encode()] if where else [])
    if method == "GET":
        assert (b"\nconnections 7.0\n" in body) == (status == 200)
    else:
        assert body == b""


def test_options_of_the_server(start: Start) -> None:
    """RFC 9110, section 9.3.7: ``OPTIONS *`` is a ping, and says what is allowed."""
    answer = ask(start(make_app()), "*", "OPTIONS")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("target", ["x:80", "/", "*"])
def test_connect(start: Start, target: str) -> None:
    """It is no proxy."""
    with dial(start(make_app())) as sock:
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("HTTP/1.0\r\n", 200),
        ("HTTP/1.0\r\nConnection: keep-alive\r\n", 200),
        ("HTTP/1.1\r\nhOsT:\r\n", 200),
        ("HTTP/1.1\r\nHost: [::1]:9690\r\n", 200),
        ("HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\n", 200),
        ("HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n", 200),
        ("HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\n", 200),
        (
            "HTTP/1.1\r\nHost: x\r\nIf-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT\r\n",
            200,
        ),
        ("HTTP/1.2\r\nHost: x\r\n", 200),
        ("HTTP/1.1\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nHost: x\r\n", 400),
        ("HTTP/1.1\r\nHost: a b\r\n", 400),
        ("HTTP/1.1\r\nHost: a/b\r\n", 400),
        ("HTTP/1.0\r\nHost: a/b\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nX : y\r\n", 400),
        ("HTTP/1.1\r\nHost: x\r\nExpect: x\r\n", 417),
        (f"HTTP/1.1\r\nHost: x\r\nX: {'x' * 25_000}\r\n", 431),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n", 501),
        ("HTTP/2.0\r\nHost: x\r\n", 505),
        ("HTTP/0.9\r\n", 505),
    ],
)
def test_heads(start: Start, head: str, status: int) -> None:
    """Each gets the status that node_exporter 1.5 answers, but for the longest one: it
    allows 1 MiB.
    """
    with dial(start(make_app(Flaky()))) as sock:
        sock.sendall(f"GET /metrics {head}\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_other_methods(start: Start, method: str) -> None:
    """Other methods are refused, and the right ones named."""
    collector = Flaky()
    answer = ask(start(make_app(collector)), "/metrics", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert collector.collections == 0


def test_not_ready_then_ready(start: Start) -> None:
    """Until we are ready nothing is collected, and both pages say what is awaited."""
    awaited: str | None = "the socket tables are being read"
    collector = Flaky()
    port = start(make_app(collector, ready=lambda: awaited))
    for path in ("/metrics", "/-/ready"):
        answer = ask(port, path)
        assert answer.status == 503
        assert b"the socket tables are being read" in answer.body
    assert ask(port, "/-/healthy").status == 200
    assert collector.collections == 0
    awaited = None
    assert ask(port, "/-/ready").status == 200
    assert ask(port, "/metrics").status == 200


def test_scrapes_at_once(start: Start) -> None:
    """Those that have come by the time it begins share a collection; who comes later has
    one of their own.
    """
    collector = Held()
    port = start(make_app(collector))
    with ThreadPoolExecutor() as threads, contextlib.ExitStack() as opened:
        first = threads.submit(ask, port, "/metrics")
        assert collector.begun.wait(PATIENCE_S)
        # The event loop is busy with it, so these wait in the kernel.
        crowd = [opened.enter_context(dial(port)) for _ in range(server.ACCEPTED_AT_ONCE)]
        for sock in crowd:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        collector.go_on.set()
        assert b"connections 1.0" in first.result().body
        pages = [read_all(sock) for sock in crowd]
    assert all(b"connections 2.0" in page for page in pages)
    for number in (3, 4):
        assert f"connections {number}.0".encode() in ask(port, "/metrics").body


def test_source_error(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A source in trouble gives 503 and its sentence, which is logged when it changes."""
    caplog.set_level(logging.INFO, server.__name__)
    collector = Flaky()
    port = start(make_app(collector))
    caplog.clear()
    for sentence in ("the map is gone", "the map is gone", "no descriptors left"):
        collector.trouble = SourceError(sentence)
        answer = ask(port, "/metrics")
        assert answer.status == 503
        assert sentence in answer.body.decode()
    collector.trouble = None
    for _ in range(2):
        assert ask(port, "/metrics").status == 200
    assert caplog.messages == [
        "no metrics can be had: the map is gone",
        "no metrics can be had: no descriptors left",
        "metrics can be had again",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_fault(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of ours gives 503 and one line without a traceback; the next scrape works."""
    collector = Flaky()
    collector.trouble = ZeroDivisionError("not expected")
    port = start(make_app(collector))
    for _ in range(3):
        assert ask(port, "/metrics").status == 503
    (told,) = caplog.messages
    assert told == "no metrics can be had: ZeroDivisionError: not expected"
    collector.trouble = None
    assert ask(port, "/metrics").status == 200


class Page(HTMLParser):
    """What a page has: elements that are closed in order, links, text."""

    void = ("meta", "link", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_landing_page(start: Start) -> None:
    """The page has the version, the settings as text, and links to the rest."""
    hostile = '<script>alert("1")</script>&amp;'
    settings = {"ports": (80, 443), "conf": None, "<b>user": hostile}
    port = start(make_app(settings=settings))
    answer = ask(port, "/")
    page = Page(answer.body.decode())
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert page.open == []
    assert "script" not in page.tags
    assert "b" not in page.tags
    for text in ("1.2.3", "ports", "80, 443", "not set", "<b>user", hostile):
        assert text in page.text
    assert page.links == ["metrics", "-/healthy", "-/ready"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_landing_page_style_is_permitted(start: Start) -> None:
    """The hash that the policy permits is that of the style the page has."""
    answer = ask(start(make_app()), "/")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.body.decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in answer.headers["content-security-policy"]


# Where it listens


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


@needs_ipv6
def test_every_address(start: Start) -> None:
    """Without an address, both families are served at one port."""
    port = start(make_app(), None)
    assert [ask(port, "/-/healthy", host=h).status for h in (LOOPBACK, "::1")] == [200, 200]


@needs_ipv6
@pytest.mark.parametrize(("address", "other"), [(LOOPBACK, "::1"), ("::1", LOOPBACK)])
def test_one_address(start: Start, address: str, other: str) -> None:
    """With an address, nothing is served at another."""
    port = start(make_app(), address)
    assert ask(port, "/-/healthy", host=address).status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/-/healthy", host=other)


@needs_ipv6
def test_every_address_as_ipv6_has_it(start: Start) -> None:
    """``[::]`` is both families, as in exporters that are written in Go, and a client of
    IPv4 has an IPv4 address: an IPv6 one would make all of them one source network.
    """
    app = make_app()
    seen: list[str] = []

    async def show(scope: server.Scope) -> server._Response:
        seen.append(scope["client"][0])
        return server._text(200, "seen")

    app._pages = {**app._pages, "/show": show}
    port = start(app, "::")
    for host in (LOOPBACK, "::1"):
        assert ask(port, "/show", host=host).status == 200
    assert seen == [LOOPBACK, "::1"]


@needs_ipv6
def test_every_address_of_ipv4(start: Start) -> None:
    """``0.0.0.0`` is IPv4 alone."""
    port = start(make_app(), "0.0.0.0")
    assert ask(port, "/-/healthy").status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/-/healthy", host="::1")


def test_host_name(start: Start) -> None:
    """A name does as well as an address."""
    assert ask(start(make_app(), "localhost"), "/-/healthy").status == 200


def test_name_found_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves twice to one address is listened on once."""
    found = socket.getaddrinfo(LOOPBACK, 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found * 2)
    (sock,) = server.listen("localhost", 0)
    sock.close()


def test_restart() -> None:
    """A port is free again at once, although a connection that we closed lingers on it."""
    (listener,) = server.listen(LOOPBACK, 0)
    port = listener.getsockname()[1]
    with dial(port) as client:
        listener.accept()[0].close()
        assert client.recv(1) == b""
    listener.close()
    (listener,) = server.listen(LOOPBACK, port)
    listener.close()


def test_port_in_use() -> None:
    """Whoever takes a port that is taken is told so, and what to do."""
    with contextlib.ExitStack() as opened:
        for sock in server.listen(LOOPBACK, 0):
            opened.enter_context(sock)
        port = sock.getsockname()[1]
        with pytest.raises(ServerError) as refused:
            server.listen(None, port)
    assert str(refused.value) == (
        f"port {port} is already in use: stop what uses it or choose another with --listen"
    )


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "port 80 is not permitted: start as root or choose"),
        (errno.EADDRNOTAVAIL, "127.0.0.1 is not an address of this host: choose"),
        (errno.ENOBUFS, "cannot listen at 127.0.0.1 on port 80: No buffer space available"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
    """Each way in which the kernel refuses has its sentence; no socket is left open."""

    def bind(_sock: socket.socket, _address: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(ServerError, match=f"^{re.escape(sentence)}"):
        server.listen(LOOPBACK, 80)


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "unknown"), UnicodeError("too long")]
)
def test_unknown_name(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A name that nobody knows is refused by name."""

    def getaddrinfo(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ServerError, match=r"^nowhere is not known: give an address"):
        server.listen("nowhere", 0)


@pytest.fixture
def ipv6_error(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the kernel refuse IPv6 with an error."""
    bind = socket.socket.bind

    def refuse(number: int) -> None:
        def bind_ipv4(sock: socket.socket, address: tuple[str, int]) -> None:
            if sock.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            bind(sock, address)

        monkeypatch.setattr(socket.socket, "bind", bind_ipv4)

    return refuse


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
@pytest.mark.parametrize("address", [None, "::"])
def test_host_without_ipv6(
    ipv6_error: Callable[[int], None], number: int, address: str | None
) -> None:
    """A host without IPv6 is served by IPv4 alone, unless an IPv6 address was asked for."""
    ipv6_error(number)
    (sock,) = server.listen(address, 0)
    sock.close()
    assert sock.family == socket.AF_INET
    with pytest.raises(ServerError, match=r"^::1 "):
        server.listen("::1", 0)


@needs_ipv6
def test_port_in_use_for_ipv6_only(ipv6_error: Callable[[int], None]) -> None:
    """Half of what was asked for is refused like none of it, and nothing is left open."""
    ipv6_error(errno.EADDRINUSE)
    with pytest.raises(ServerError, match=r"^port \d+ is already in use"):
        server.listen(None, 0)


# Clients that are slow, many or strange


def test_keep_alive(start: Start) -> None:
    """One connection serves one scrape after another."""
    port = start(make_app(Flaky()))
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        ports = set()
        for _ in range(3):
            connection.request("GET", "/metrics")
            ports.add(connection.sock.getsockname())
            assert connection.getresponse().read()
    assert len(ports) == 1


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_slow_request(start: Start, monkeypatch: pytest.MonkeyPatch, requests: int) -> None:
    """A request that dribbles in is dropped in time, be it the first or a later one."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        for _ in range(requests):
            sock.sendall(HEALTHY)
            read_until(sock, b"healthy\n")
            time.sleep(0.5)  # idle: the deadline of a request is not for this
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert dropped_while_sending(sock, b"x", every_s=0.05)


def test_silent_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and says nothing is dropped."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        assert read_all(sock) == b""


def test_idle_connection_is_closed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is not kept for ever after its last request."""
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.3)
    with dial(start(make_app())) as sock:
        sock.sendall(LANDING)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (LANDING, b""),
        (LANDING + LANDING, b""),
        (LANDING + b"\x16\x03", b""),
        (HEALTHY + LANDING, b"healthy\n"),
    ],
)
def test_slow_reader(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes, read: bytes
) -> None:
    """Whoever does not read a response is dropped in time, whatever else they send."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)
    bind = server._bind

    def bind_with_small_buffer(*where: Any) -> socket.socket:
        sock = bind(*where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    # The kernel takes 12 kB of the response, the rest is for us to keep.
    monkeypatch.setattr(server, "_bind", bind_with_small_buffer)
    port = start(make_app(settings={"setting": "x" * 40_000}))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(PATIENCE_S)
        sock.connect((LOOPBACK, port))
        sock.sendall(sent)
        received = b""
        while read not in received:
            received += sock.recv(1)
        assert until_refused(sock)


def until_refused(sock: socket.socket) -> bool:
    """Whether the server resets a connection from which nothing is read."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET:
            return True
        time.sleep(0.05)
    return False


def test_patient_reader(start: Start) -> None:
    """A big response arrives whole in many reads, and the next one after it."""
    port = start(make_app(Flaky(), settings={"setting": "x" * 20_000_000}))
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        response = connection.getresponse()
        assert len(response.read()) == int(response.headers["content-length"]) > 20_000_000
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200


def test_more_clients_than_places(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow clients lose their places, the oldest first, and a scrape is answered."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    port = start(make_app(Flaky()))
    with contextlib.ExitStack() as opened:
        slow = []
        for _ in range(24):
            slow.append(opened.enter_context(dial(port)))
            slow[-1].sendall(b"GET /metrics HTTP/1.1\r\n")
        assert ask(port, "/metrics").status == 200
        assert [is_open(sock) for sock in slow] == [False] * 17 + [True] * 7


def test_a_crowd_takes_no_place_of_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps a connection, or is slow, loses it to no crowd from elsewhere."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    port = start(make_app())
    with contextlib.ExitStack() as opened:
        kept, slow = (
            opened.enter_context(dial(port, f"127.0.0.{each}")) for each in (2, 3)
        )
        kept.sendall(HEALTHY)
        read_until(kept, b"healthy\n")
        slow.sendall(HEALTHY[:7])
        crowd = [opened.enter_context(dial(port)) for _ in range(24)]
        crowd[-1].sendall(HEALTHY)
        read_until(crowd[-1], b"healthy\n")
        assert [is_open(sock) for sock in crowd[:-1]] == [False] * 18 + [True] * 5
        for sock, left in ((kept, HEALTHY), (slow, HEALTHY[7:])):
            sock.sendall(left)
            read_until(sock, b"healthy\n")


def test_who_is_being_answered_keeps_the_place(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: as when a password is checked."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    asked, go_on = threading.Event(), threading.Event()
    app = make_app()

    async def wait(_scope: server.Scope) -> server._Response:
        asked.set()
        await asyncio.to_thread(go_on.wait, PATIENCE_S)
        return server._text(200, "at last")

    app._pages = {**app._pages, "/wait": wait}
    port = start(app)
    with contextlib.ExitStack() as opened:
        waiting = opened.enter_context(dial(port))
        waiting.sendall(HEALTHY.replace(b"/-/healthy", b"/wait"))
        assert asked.wait(PATIENCE_S)
        crowd = [opened.enter_context(dial(port)) for _ in range(24)]
        crowd[-1].sendall(HEALTHY)
        read_until(crowd[-1], b"healthy\n")
        go_on.set()
        read_until(waiting, b"at last\n")


def test_what_nobody_takes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients that do not read, so many are dropped that the rest fits, oldest first."""
    page_bytes, fit = 4_000_000, 3
    monkeypatch.setattr(server, "MAX_UNTAKEN_BYTES", fit * page_bytes)
    port = start(make_app(settings={"setting": "x" * page_bytes}))
    with contextlib.ExitStack() as opened:
        readers = []
        for _ in range(7):
            readers.append(opened.enter_context(dial(port)))
            readers[-1].sendall(LANDING)
            assert readers[-1].recv(4)
        assert all(until_refused(sock) for sock in readers[:3])
        for sock in readers[4:]:
            assert len(read_all(sock, page_bytes)) >= page_bytes


def test_what_the_kernel_keeps_for_a_client() -> None:
    """Less than it would by itself, in both directions."""
    (listener,) = server.listen(LOOPBACK, 0)
    with listener, dial(listener.getsockname()[1]):
        accepted, _ = listener.accept()
        with accepted:
            for option, kept in (
                (socket.SO_RCVBUF, server.RECEIVE_BYTES),
                (socket.SO_SNDBUF, server.SEND_BYTES),
            ):
                assert accepted.getsockopt(socket.SOL_SOCKET, option) == 2 * kept


def test_memory_of_a_crowd_is_given_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When most have gone, and once for each crowd."""
    given = []
    monkeypatch.setattr(memory, "return_memory", lambda: given.append(True))
    port = start(make_app())
    for crowds in (1, 2):
        with contextlib.ExitStack() as opened:
            for _ in range(server.CROWD):
                opened.enter_context(dial(port))
            ask(port, "/")
        while len(given) < crowds:
            ask(port, "/")
        for _ in range(5):
            ask(port, "/")
        assert len(given) == crowds


def test_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that came with its client is answered, whatever crowd comes after it."""
    assert 3 * 2 * server.ACCEPTED_AT_ONCE < server.MAX_CONNECTIONS
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3 * server.ACCEPTED_AT_ONCE + 1)
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    sockets = server.listen(LOOPBACK, 0)
    port = sockets[0].getsockname()[1]
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(dial(port))
        first.sendall(HEALTHY)
        for _ in range(2 * server.MAX_CONNECTIONS):
            opened.enter_context(dial(port))
        opened.enter_context(serving(make_app(), sockets))
        read_until(first, b"healthy\n")
        ask(port, "/")  # the crowd is in: stopping while asyncio accepts makes it warn


def test_queue_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """More clients can wait in the kernel than asyncio accepts at once."""
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    sockets = server.listen(LOOPBACK, 0)
    with serving(make_app(), sockets):
        ask(sockets[0].getsockname()[1], "/")
        info = sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    # Of a listener, tcpi_sacked is the length of its queue: tcp_get_info() in
    # net/ipv4/tcp.c.
    (length,) = struct.unpack_from("I", info, 28)
    assert length > server.ACCEPTED_AT_ONCE


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("size", [server.MAX_HEAD_BYTES + server.READ_BYTES, 10_000_000])
def test_head_without_end(start: Start, size: int) -> None:
    """A head that is too long is refused, also when it comes at once and has an end."""
    with dial(start(make_app())) as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * size + b"\r\n\r\n")
        assert b" 200 " not in read_all(sock)


def test_head_of_a_scrape_behind_proxies(start: Start) -> None:
    """A head that is long, but within the limit, is taken."""
    assert ask(start(make_app()), "/", cookie="x" * 15_000).status == 200


@pytest.mark.parametrize(
    "framing", ["Content-Length: 10000000000", "Transfer-Encoding: chunked"]
)
def test_endless_body(start: Start, framing: str) -> None:
    """A body is not waited for, not read to its end, and not taken for the next request."""
    with dial(start(make_app())) as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")
        assert dropped_while_sending(sock, b"x" * 1000, every_s=0.01)


def test_expect_continue(start: Start) -> None:
    """A client that asks first is not told to go on."""
    with dial(start(make_app())) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        sock.sendall(b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


FIN_CASES = [
    (b"GET /metrics HTTP/1.0\r\n\r\n", [200]),
    (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3, [200] * 3),
    (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 307, [200] * 307),
    (HEALTHY + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
    (HEALTHY + b"GET /metr", [200, 400]),
    (b"GET /metrics HTTP/1.1\r\nHost:", [400]),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", [405]),
    (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", [200]),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),  # HTTP/2 preface
    (b"", []),
]


def statuses(received: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"^HTTP/1.1 (\d+) ", received, re.MULTILINE)]


@pytest.mark.parametrize(("sent", "expected"), FIN_CASES)
def test_request_and_fin(start: Start, sent: bytes, expected: list[int]) -> None:
    """What came before a client closed its direction is answered, as by node_exporter.

    A fault of this kind leaves ``printf ... | nc`` without a response.
    """
    with dial(start(make_app(Flaky()))) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        received = read_all(sock)
    assert statuses(received) == expected


class Waiting:
    """An app with a page that takes as long as it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.app = make_app()
        self.app._pages = {**self.app._pages, "/wait": self._wait}

    async def _wait(self, _scope: server.Scope) -> server._Response:
        self.asked.release()
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        return server._text(200, "at last")


WAIT = HEALTHY.replace(b"/-/healthy", b"/wait")


def test_fin_long_before_the_response(start: Start) -> None:
    """The response still comes, and then the end of the connection."""
    waiting = Waiting()
    port = start(waiting.app)
    with dial(port) as sock:
        sock.sendall(WAIT)
        assert waiting.asked.acquire(timeout=PATIENCE_S)
        sock.shutdown(socket.SHUT_WR)
        ask(port, "/")  # the server has seen the FIN when it has answered this
        waiting.go_on.set()
        assert read_all(sock).endswith(b"at last\n")


def test_fin_with_a_response_that_is_not_taken(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has closed its direction and reads nothing is dropped in time."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)
    with dial(start(make_app(settings={"setting": "x" * 20_000_000}))) as sock:
        sock.sendall(LANDING)
        sock.shutdown(socket.SHUT_WR)
        assert until_refused(sock)


def test_fin_with_a_response_that_does_not_come(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of a request is for those that have closed their direction, too."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.3)
    waiting = Waiting()
    with dial(start(waiting.app)) as sock:
        sock.sendall(WAIT)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    waiting.go_on.set()


def test_half_closed_connections_lose_their_slots_first(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has sent FIN may be gone: it keeps no slot that another client needs.

    A fault of this kind lets clients that ask and leave take all slots for ten seconds.
    """
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    waiting = Waiting()
    port = start(waiting.app)
    with contextlib.ExitStack() as opened:
        waits = opened.enter_context(dial(port))
        waits.sendall(WAIT)
        for number in range(23):
            with dial(port) as sock:
                sock.sendall(WAIT)
                assert waiting.asked.acquire(timeout=PATIENCE_S), number
        assert ask(port, "/-/healthy").status == 200
        waiting.go_on.set()
        read_until(waits, b"at last\n")


def test_pipelining(start: Start) -> None:
    """Requests sent without waiting are answered in their order."""
    paths = ("/-/healthy", "/nowhere", "/-/ready")
    requests = [f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths]
    with dial(start(make_app())) as sock:
        sock.sendall(b"".join(requests) + b"GET / HTTP/1.0\r\n\r\n")
        answers = re.findall(rb"^HTTP/1.1 (\d+) ", read_all(sock), re.MULTILINE)
    assert answers == [b"200", b"404", b"200", b"200"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS ClientHello
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /\xff\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        LANDING + b"\x16",
        b"\r\n\r\n",
    ],
)
def test_not_http(start: Start, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    """What is not HTTP/1 is told so and closed, without a word in the log."""
    port = start(make_app(Flaky()))
    caplog.clear()
    with dial(port) as sock:
        sock.sendall(sent)
        assert b"HTTP/1.1 400 " in read_all(sock)
    assert ask(port, "/metrics").status == 200
    assert caplog.messages == []


def test_body_that_is_not_http(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A body that turns out invalid while its request is answered is no fault of ours."""
    port = start(make_app())
    caplog.clear()
    with dial(port) as sock:
        sock.sendall(LANDING[:-2] + b"Transfer-Encoding: chunked\r\n\r\nnot a chunk\r\n")
        assert read_all(sock) == b""
    assert caplog.messages == []


def test_upgrade(start: Start) -> None:
    """A WebSocket is not to be had: the request is answered like any other."""
    answer = ask(
        start(make_app()),
        "/",
        connection="upgrade",
        upgrade="websocket",
        sec_websocket_key="x",
    )
    assert answer.status == 200


@pytest.mark.parametrize(("sent", "read"), [(HEALTHY, b"healthy\n"), (b"GET /", b"")])
def test_resets_leave_nothing_behind(start: Start, sent: bytes, read: bytes) -> None:
    """A client that resets its connection leaves no timer that keeps it in memory."""
    port = start(make_app())
    for _ in range(20):
        with dial(port) as sock:
            sock.sendall(sent)
            read_until(sock, read)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, server._RESET_ON_CLOSE)
    end = time.monotonic() + server.REQUEST_TIMEOUT_S / 2
    while connections_in_memory() > 5:
        assert time.monotonic() < end
        ask(port, "/")


def connections_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, server._Connection) for each in gc.get_objects())


def test_check_collects_unless_a_scrape_has_worked(start: Start) -> None:
    """Once for each check that no scrape came before; what keeps it from that is told."""
    flaky = Flaky()
    app = make_app(flaky)
    port = start(app)
    before = flaky.collections  # the registry asks for names when it is registered
    assert ask(port, "/metrics").status == 200
    assert asyncio.run(app.check()) is None
    assert flaky.collections == before + 1
    assert asyncio.run(app.check()) is None
    assert flaky.collections == before + 2
    flaky.trouble = SourceError("the tables are gone")
    assert asyncio.run(app.check()) == "the tables are gone"
    flaky.trouble = None
    assert asyncio.run(app.check()) is None


@pytest.mark.parametrize("fault", [MemoryError(), ZeroDivisionError("a fault")])
def test_check_survives_every_fault(
    fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """It would not be asked again otherwise."""
    flaky = Flaky()
    app = make_app(flaky)
    flaky.trouble = fault
    assert "memory" in (told := asyncio.run(app.check()) or "") or "a fault" in told
    assert "can be had" in caplog.text
    flaky.trouble = None
    assert asyncio.run(app.check()) is None


def test_check_before_it_is_ready() -> None:
    """What is waited for is told, and nothing collected."""
    flaky = Flaky()
    app = make_app(flaky, ready=lambda: "patience")
    before = flaky.collections
    assert asyncio.run(app.check()) == "patience"
    assert flaky.collections == before


def test_without_memory_a_scrape_is_503(start: Start) -> None:
    """With a sentence; not a fault of ours."""
    flaky = Flaky()
    port = start(make_app(flaky))
    flaky.trouble = MemoryError()
    answer = ask(port, "/metrics")
    assert answer.status == 503
    assert b"not enough memory" in answer.body


def test_other_settings_are_shown(start: Start) -> None:
    """From then on, on the landing page."""
    app = make_app(settings={"duration_s": 6})
    port = start(app)
    app.show({"duration_s": 61})
    assert b"<td>61</td>" in ask(port, "/").body


def test_accepting_again_when_nobody_listens_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio tries again a second after it could not; by then we may have stopped."""
    (listener,) = server.listen(LOOPBACK, 0)
    listener.close()
    caplog.clear()

    async def try_again() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(server._Accepting())
        loop.call_soon(loop._start_serving, asyncio.Protocol, listener)  # type: ignore[attr-defined]
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    asyncio.run(try_again())
    (fault,) = caplog.messages
    assert "lambda" in fault


# The end

PROGRAM = """
import signal
from prometheus_client import CollectorRegistry
from tcpexporter.host import malloc as memory
from tcpexporter.web import server

sockets = server.listen("127.0.0.1", 0)
print(sockets[0].getsockname()[1], flush=True)
settings = {"setting": "x" * 40_000_000}
app = server.App(CollectorRegistry(), ready=lambda: None, settings=settings, version="1")
signal.signal(signal.SIGTERM, print)
signal.signal(signal.SIGINT, print)
server.serve(sockets, app)
assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is print
print("returned")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal(number: signal.Signals) -> None:
    """A signal ends it soon and quietly, whatever its clients are in the middle of."""
    with (
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        contextlib.ExitStack() as opened,
    ):
        assert process.stdout
        port = int(process.stdout.readline())
        clients = [opened.enter_context(dial(port)) for _ in range(4)]
        _silent, idle, slow, reader = clients
        idle.sendall(b"GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        slow.sendall(b"GET /-/ready HTTP/1.1\r\n")
        reader.sendall(LANDING)
        assert idle.recv(65536)
        assert reader.recv(10)
        before = time.monotonic()
        process.send_signal(number)
        try:
            output, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        took_s = time.monotonic() - before
    assert (process.returncode, output, errors) == (0, "returned\n", "")
    assert took_s < 3


def test_no_page_waits_for_a_delayed_ack() -> None:
    """asyncio sets TCP_NODELAY on what comes from a socket that says it is TCP."""
    sockets = server.listen(None, 0)
    for each in sockets:
        assert each.proto == socket.IPPROTO_TCP
        each.close()
