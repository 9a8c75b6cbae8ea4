# SPDX-License-Identifier: GPL-3.0-only
"""HTTP/1.1 over real sockets: clients that are slow, many, or do not speak HTTP."""

import asyncio
import contextlib
import gc
import http.client
import re
import socket
import threading
import time
from typing import Any

import pytest

from tcpexporter.host import malloc
from tcpexporter.web import connection, http1, http_clients, listen
from tests.unit.web.support import (
    HEALTHY,
    LANDING,
    LOOPBACK,
    PATIENCE_S,
    Flaky,
    Start,
    ask,
    dial,
    dropped_while_sending,
    is_open,
    make_app,
    read_all,
    read_until,
    statuses,
    until_refused,
)


def test_consecutive_scrapes_use_one_connection(start: Start) -> None:
    """The server keeps a connection open after a response."""
    port = start(make_app(Flaky()))
    client = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(client):
        ports = set()
        for _ in range(3):
            client.request("GET", "/metrics")
            ports.add(client.sock.getsockname())
            assert client.getresponse().read()
    assert len(ports) == 1


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_a_slow_request_is_dropped(
    start: Start, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    """A client that sends its first or a later request slowly is dropped in time."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        for _ in range(requests):
            sock.sendall(HEALTHY)
            read_until(sock, b"healthy\n")
            time.sleep(0.5)  # idle time is not part of a request's deadline
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert dropped_while_sending(sock, b"x", every_s=0.05)


def test_a_silent_client_is_dropped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that connects and sends nothing is dropped."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        assert read_all(sock) == b""


def test_an_idle_connection_is_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is KEEP_ALIVE_S."""
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.3)
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
def test_a_client_that_does_not_read_is_dropped(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes, read: bytes
) -> None:
    """The limit applies whatever the client sends."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.5)
    bind = listen._bind

    def bind_with_small_buffer(*where: Any) -> socket.socket:
        sock = bind(*where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    # The kernel accepts 12 kB of the response; the rest stays in the exporter.
    monkeypatch.setattr(listen, "_bind", bind_with_small_buffer)
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


def test_a_large_response_arrives_completely(start: Start) -> None:
    """The response has 20 MB, and the next response arrives too."""
    port = start(make_app(Flaky(), settings={"setting": "x" * 20_000_000}))
    client = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(client):
        client.request("GET", "/")
        response = client.getresponse()
        assert len(response.read()) == int(response.headers["content-length"]) > 20_000_000
        client.request("GET", "/metrics")
        assert client.getresponse().status == 200


def test_slow_clients_are_evicted_when_all_slots_are_taken(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest waiting client is evicted first, and a scrape gets its response."""
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 8)
    port = start(make_app(Flaky()))
    with contextlib.ExitStack() as opened:
        slow = []
        for _ in range(24):
            slow.append(opened.enter_context(dial(port)))
            slow[-1].sendall(b"GET /metrics HTTP/1.1\r\n")
        assert ask(port, "/metrics").status == 200
        assert [is_open(sock) for sock in slow] == [False] * 17 + [True] * 7


def test_many_clients_of_one_network_do_not_evict_clients_of_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle and a slow client in other networks keep their connections."""
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 8)
    port = start(make_app())
    with contextlib.ExitStack() as opened:
        kept, slow = (
            opened.enter_context(dial(port, f"127.0.0.{each}")) for each in (2, 3)
        )
        kept.sendall(HEALTHY)
        read_until(kept, b"healthy\n")
        slow.sendall(HEALTHY[:7])
        many = [opened.enter_context(dial(port)) for _ in range(24)]
        many[-1].sendall(HEALTHY)
        read_until(many[-1], b"healthy\n")
        assert [is_open(sock) for sock in many[:-1]] == [False] * 18 + [True] * 5
        for sock, left in ((kept, HEALTHY), (slow, HEALTHY[7:])):
            sock.sendall(left)
            read_until(sock, b"healthy\n")


def test_a_client_that_is_being_answered_is_not_evicted(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds however long the response takes, for example for a password check."""
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 8)
    asked, go_on = threading.Event(), threading.Event()
    app = make_app()

    async def wait(_request: http1.Request) -> http1.Response:
        asked.set()
        await asyncio.to_thread(go_on.wait, PATIENCE_S)
        return http1.text(200, "at last")

    app._pages = {**app._pages, "/wait": wait}
    port = start(app)
    with contextlib.ExitStack() as opened:
        waiting = opened.enter_context(dial(port))
        waiting.sendall(HEALTHY.replace(b"/-/healthy", b"/wait"))
        assert asked.wait(PATIENCE_S)
        many = [opened.enter_context(dial(port)) for _ in range(24)]
        many[-1].sendall(HEALTHY)
        read_until(many[-1], b"healthy\n")
        go_on.set()
        read_until(waiting, b"at last\n")


def test_unsent_data_is_limited(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that do not read are dropped, longest waiting first, until the rest fits."""
    page_bytes, fit = 4_000_000, 3
    monkeypatch.setattr(http_clients, "MAX_UNSENT_BYTES", fit * page_bytes)
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


def test_memory_is_returned_after_many_connections(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is returned three times after each time that there were many: when 16, 4 and 1 of
    64 are left."""
    returned = []
    monkeypatch.setattr(malloc, "return_memory", lambda: returned.append(True))
    port = start(make_app())
    for rounds in (1, 2):
        with contextlib.ExitStack() as opened:
            for _ in range(http_clients.MANY_CONNECTIONS):
                opened.enter_context(dial(port))
            ask(port, "/")
        while len(returned) < 3 * rounds:
            ask(port, "/")
        for _ in range(5):
            ask(port, "/")
        assert len(returned) == 3 * rounds


@pytest.mark.parametrize(
    "size", [connection.MAX_HEAD_BYTES + connection.READ_BYTES, 10_000_000]
)
def test_a_head_that_is_too_long_is_refused(start: Start, size: int) -> None:
    """This includes a complete head."""
    with dial(start(make_app())) as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * size + b"\r\n\r\n")
        assert b" 200 " not in read_all(sock)


def test_a_long_head_of_proxies_is_accepted(start: Start) -> None:
    """Proxies add headers, but the head stays within the limit."""
    assert ask(start(make_app()), "/", cookie="x" * 15_000).status == 200


@pytest.mark.parametrize(
    "framing", ["Content-Length: 10000000000", "Transfer-Encoding: chunked"]
)
def test_an_endless_body_is_ignored(start: Start, framing: str) -> None:
    """The response does not wait for a body, and the body is not parsed as a request."""
    with dial(start(make_app())) as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")
        assert dropped_while_sending(sock, b"x" * 1000, every_s=0.01)


def test_expect_continue_gets_the_response(start: Start) -> None:
    """A client with Expect: 100-continue gets the response and no status 100."""
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


@pytest.mark.parametrize(("sent", "expected"), FIN_CASES)
def test_requests_before_a_fin_get_responses(
    start: Start, sent: bytes, expected: list[int]
) -> None:
    """Responses are the same as those of node_exporter.

    The kind of fault: ``nc`` gets no response, because it closes its sending direction
    first.
    """
    with dial(start(make_app(Flaky()))) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        received = read_all(sock)
    assert statuses(received) == expected


class Waiting:
    """An application with a page whose response waits for ``go_on``."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.app = make_app()
        self.app._pages = {**self.app._pages, "/wait": self._wait}

    async def _wait(self, _request: http1.Request) -> http1.Response:
        self.asked.release()
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        return http1.text(200, "at last")


WAIT = HEALTHY.replace(b"/-/healthy", b"/wait")


def test_a_client_that_sent_fin_gets_a_late_response(start: Start) -> None:
    """The connection is closed after the response."""
    waiting = Waiting()
    port = start(waiting.app)
    with dial(port) as sock:
        sock.sendall(WAIT)
        assert waiting.asked.acquire(timeout=PATIENCE_S)
        sock.shutdown(socket.SHUT_WR)
        ask(port, "/")  # this response shows that the server has read the FIN
        waiting.go_on.set()
        assert read_all(sock).endswith(b"at last\n")


def test_a_client_that_sent_fin_and_does_not_read_is_dropped(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is dropped within the time limit."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.5)
    with dial(start(make_app(settings={"setting": "x" * 20_000_000}))) as sock:
        sock.sendall(LANDING)
        sock.shutdown(socket.SHUT_WR)
        assert until_refused(sock)


def test_the_deadline_applies_after_a_fin(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also drops clients whose response does not come."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.3)
    waiting = Waiting()
    with dial(start(waiting.app)) as sock:
        sock.sendall(WAIT)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    waiting.go_on.set()


def test_half_closed_connections_lose_their_slots_first(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has sent FIN may be gone, so it keeps no slot that another client
    needs.

    The kind of fault: clients send a request, leave, and hold all slots for ten seconds.
    """
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 8)
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


def test_a_fault_gives_500(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of a page is logged in one line, and the connection is closed."""
    app = make_app()

    async def fail(_request: http1.Request) -> http1.Response:
        raise ZeroDivisionError("not expected")

    app._pages = {**app._pages, "/fail": fail}
    port = start(app)
    caplog.clear()
    with dial(port) as sock:
        sock.sendall(HEALTHY.replace(b"/-/healthy", b"/fail"))
        assert statuses(read_all(sock)) == [500]
    assert ask(port, "/-/healthy").status == 200
    assert caplog.messages == ["cannot make a response: ZeroDivisionError: not expected"]


def test_pipelined_requests_get_responses_in_order(start: Start) -> None:
    """The client sends all requests before it reads."""
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
def test_input_that_is_not_http_is_refused(
    start: Start, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """The response is 400, the connection is closed, and nothing is logged."""
    port = start(make_app(Flaky()))
    caplog.clear()
    with dial(port) as sock:
        sock.sendall(sent)
        assert b"HTTP/1.1 400 " in read_all(sock)
    assert ask(port, "/metrics").status == 200
    assert caplog.messages == []


def test_a_body_that_is_not_http_logs_nothing(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The body arrives during the response."""
    port = start(make_app())
    caplog.clear()
    with dial(port) as sock:
        sock.sendall(LANDING[:-2] + b"Transfer-Encoding: chunked\r\n\r\nnot a chunk\r\n")
        assert read_all(sock) == b""
    assert caplog.messages == []


def test_upgrade_is_ignored(start: Start) -> None:
    """The response is that of a request without upgrade: WebSocket is not supported."""
    answer = ask(
        start(make_app()),
        "/",
        connection="upgrade",
        upgrade="websocket",
        sec_websocket_key="x",
    )
    assert answer.status == 200


@pytest.mark.parametrize(("sent", "read"), [(HEALTHY, b"healthy\n"), (b"GET /", b"")])
def test_a_reset_connection_is_freed(start: Start, sent: bytes, read: bytes) -> None:
    """No timer keeps the connection in memory."""
    port = start(make_app())
    for _ in range(20):
        with dial(port) as sock:
            sock.sendall(sent)
            read_until(sock, read)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, connection._RESET_ON_CLOSE)
    end = time.monotonic() + connection.REQUEST_TIMEOUT_S / 2
    while connections_in_memory() > 5:
        assert time.monotonic() < end
        ask(port, "/")


def connections_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, connection.Connection) for each in gc.get_objects())
