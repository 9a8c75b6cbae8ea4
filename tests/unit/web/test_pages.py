# SPDX-License-Identifier: GPL-3.0-only
"""The response to each request: pages, formats, refusals, readiness, failures."""

import asyncio
import contextlib
import gzip
import logging
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tcpexporter.errors import SourceError
from tcpexporter.web import pages
from tcpexporter.web.server import ACCEPTED_AT_ONCE
from tests.unit.web.support import (
    PATIENCE_S,
    Flaky,
    Held,
    Start,
    ask,
    dial,
    make_app,
    read_all,
)


def test_the_default_format_is_text(start: Start) -> None:
    """The request has no Accept header."""
    answer = ask(start(make_app(Flaky())), "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    (family,) = parse_text(answer.body.decode())
    assert [(s.name, s.value) for s in family.samples] == [("connections", 7)]


def test_prometheus_gets_openmetrics(start: Start) -> None:
    """Prometheus' own parser accepts the response to its Accept header."""
    wanted = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = ask(start(make_app(Flaky())), "/metrics", accept=wanted)
    assert answer.headers["content-type"].startswith(
        "application/openmetrics-text; version=1"
    )
    (family,) = parse_openmetrics(answer.body.decode())  # type: ignore[no-untyped-call]
    assert [(s.name, s.value) for s in family.samples] == [("connections", 7)]


def test_an_invalid_accept_header_is_ignored(start: Start) -> None:
    """A version that is not a number is no reason for an error."""
    wanted = "application/openmetrics-text;version=x"
    answer = ask(start(make_app(Flaky())), "/metrics", accept=wanted)
    assert (answer.status, b"connections 7" in answer.body) == (200, True)


def test_a_client_that_accepts_gzip_gets_it(start: Start) -> None:
    """The page is the same, and the response has the compressed length."""
    port = start(make_app(Flaky()))
    plain = ask(port, "/metrics")
    packed = ask(port, "/metrics", accept_encoding="deflate, gzip;q=0.8")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["content-length"] == str(len(packed.body))
    assert gzip.decompress(packed.body) == plain.body


def test_the_name_parameter_selects_metrics(start: Start) -> None:
    """The parameter is name[]. It works for collectors without ``describe`` too."""
    port = start(make_app(Flaky()))
    for query in (
        "name[]=connections",
        "name%5B%5D=%63onnections",
        "name[]=x&name[]=connections",
    ):
        assert b"connections 7" in ask(port, f"/metrics?{query}").body
    assert ask(port, "/metrics?name[]=others", accept_encoding="gzip").body == b""


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_vary_names_the_headers_that_matter(start: Start, method: str) -> None:
    """Caches require the names of the request headers that chose the response."""
    port = start(make_app(Flaky()))
    for encoding in ("", "gzip"):
        answer = ask(port, "/metrics", method, accept_encoding=encoding)
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
    assert ask(port, "/metrics?name[]=x", method).headers["vary"] == "Accept"
    assert ask(port, "/", method).headers["vary"] == "Accept-Encoding"
    assert "vary" not in ask(port, "/-/healthy", method).headers


def test_several_accept_lines_are_one_list(start: Start) -> None:
    """The name of the header may be in upper or lower case."""
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
def test_head_gets_headers_without_a_body(start: Start, path: str) -> None:
    """The headers are those of GET, with length and date."""
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
def test_an_unknown_path_is_not_found(start: Start, path: str) -> None:
    """Only the exact paths of the pages are found."""
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
def test_each_target_has_the_status_of_node_exporter(
    start: Start, method: str, target: str, status: int, where: str | None
) -> None:
    """The status is that of node_exporter 1.5.

    The exception is a target without scheme and slash: 400 instead of a redirect. The kind
    of fault: scrapes through a proxy fail.
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


def test_options_of_the_whole_server_are_answered(start: Start) -> None:
    """``OPTIONS *`` is a ping (RFC 9110, section 9.3.7); the response has Allow."""
    answer = ask(start(make_app()), "*", "OPTIONS")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("target", ["x:80", "/", "*"])
def test_connect_is_refused(start: Start, target: str) -> None:
    """The exporter is not a proxy, to which clients send CONNECT."""
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
def test_each_head_has_the_status_of_node_exporter(
    start: Start, head: str, status: int
) -> None:
    """The status is that of node_exporter 1.5.

    The exception is the longest head: node_exporter allows 1 MiB.
    """
    with dial(start(make_app(Flaky()))) as sock:
        sock.sendall(f"GET /metrics {head}\r\n".encode())
        # the response to a long head may come before its end
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(start: Start, method: str) -> None:
    """The response is 405 with the allowed methods, and nothing is collected."""
    collector = Flaky()
    answer = ask(start(make_app(collector)), "/metrics", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert collector.collections == 0


def test_readiness_changes_after_the_start(start: Start) -> None:
    """Until the exporter is ready nothing is collected, and both pages have the reason."""
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


def test_concurrent_scrapes_share_a_collection(start: Start) -> None:
    """Scrapes that arrive before a collection begins share it, but later scrapes do not."""
    collector = Held()
    port = start(make_app(collector))
    with ThreadPoolExecutor() as threads, contextlib.ExitStack() as opened:
        first = threads.submit(ask, port, "/metrics")
        assert collector.begun.wait(PATIENCE_S)
        # The collection blocks the event loop, so these clients wait in the kernel.
        clients = [opened.enter_context(dial(port)) for _ in range(ACCEPTED_AT_ONCE)]
        for sock in clients:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        collector.go_on.set()
        assert b"connections 1.0" in first.result().body
        pages = [read_all(sock) for sock in clients]
    assert all(b"connections 2.0" in page for page in pages)
    for number in (3, 4):
        assert f"connections {number}.0".encode() in ask(port, "/metrics").body


def test_a_failing_source_gives_503(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """The response has the error, which is logged when it changes."""
    caplog.set_level(logging.INFO, pages.__name__)
    collector = Flaky()
    port = start(make_app(collector))
    caplog.clear()
    for sentence in ("the map is gone", "the map is gone", "no descriptors left"):
        collector.error = SourceError(sentence)
        answer = ask(port, "/metrics")
        assert answer.status == 503
        assert sentence in answer.body.decode()
    collector.error = None
    for _ in range(2):
        assert ask(port, "/metrics").status == 200
    assert caplog.messages == [
        "cannot collect metrics: the map is gone",
        "cannot collect metrics: no descriptors left",
        "collecting metrics works again",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_an_unexpected_error_gives_503(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged in one line without a traceback, and the next scrape works."""
    collector = Flaky()
    collector.error = ZeroDivisionError("not expected")
    port = start(make_app(collector))
    for _ in range(3):
        assert ask(port, "/metrics").status == 503
    (message,) = caplog.messages
    assert message == "cannot collect metrics: ZeroDivisionError: not expected"
    collector.error = None
    assert ask(port, "/metrics").status == 200


def test_check_collects_unless_a_scrape_succeeded(start: Start) -> None:
    """After a successful scrape a check does not collect; a failing check returns the
    reason."""
    flaky = Flaky()
    app = make_app(flaky)
    port = start(app)
    before = flaky.collections  # registering collects the names of metrics
    assert ask(port, "/metrics").status == 200
    assert asyncio.run(app.check()) is None
    assert flaky.collections == before + 1
    assert asyncio.run(app.check()) is None
    assert flaky.collections == before + 2
    flaky.error = SourceError("the tables are gone")
    assert asyncio.run(app.check()) == "the tables are gone"
    flaky.error = None
    assert asyncio.run(app.check()) is None


@pytest.mark.parametrize("fault", [MemoryError(), ZeroDivisionError("a fault")])
def test_check_returns_unexpected_errors(
    fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception would end the task that calls it."""
    flaky = Flaky()
    app = make_app(flaky)
    flaky.error = fault
    assert "memory" in (error := asyncio.run(app.check()) or "") or "a fault" in error
    assert "cannot collect" in caplog.text
    flaky.error = None
    assert asyncio.run(app.check()) is None


def test_check_before_the_start_collects_nothing() -> None:
    """The result is the step of the start that must happen first."""
    flaky = Flaky()
    app = make_app(flaky, ready=lambda: "patience")
    before = flaky.collections
    assert asyncio.run(app.check()) == "patience"
    assert flaky.collections == before


def test_without_memory_a_scrape_is_503(start: Start) -> None:
    """The response says that there is not enough memory."""
    flaky = Flaky()
    port = start(make_app(flaky))
    flaky.error = MemoryError()
    answer = ask(port, "/metrics")
    assert answer.status == 503
    assert b"not enough memory" in answer.body
