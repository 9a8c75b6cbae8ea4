# SPDX-License-Identifier: GPL-3.0-only
"""One client over a real socket: HTTP/1.1 and its limits."""

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
from tcpexporter.web import connection, listen, pages
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


def test_keep_alive(start: Start) -> None:
    """One connection serves one scrape after another."""
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
def test_slow_request(start: Start, monkeypatch: pytest.MonkeyPatch, requests: int) -> None:
    """A request that dribbles in is dropped in time, be it the first or a later one."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        for _ in range(requests):
            sock.sendall(HEALTHY)
            read_until(sock, b"healthy\n")
            time.sleep(0.5)  # idle: the deadline of a request is not for this
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert dropped_while_sending(sock, b"x", every_s=0.05)


def test_silent_client(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects and says nothing is dropped."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.3)
    with dial(start(make_app())) as sock:
        assert read_all(sock) == b""


def test_idle_connection_is_closed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is not kept for ever after its last request."""
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
def test_slow_reader(
    start: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes, read: bytes
) -> None:
    """Whoever does not read a response is dropped in time, whatever else they send."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.5)
    bind = listen._bind

    def bind_with_small_buffer(*where: Any) -> socket.socket:
        sock = bind(*where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    # The kernel takes 12 kB of the response, the rest is for us to keep.
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


def test_patient_reader(start: Start) -> None:
    """A big response arrives whole in many reads, and the next one after it."""
    port = start(make_app(Flaky(), settings={"setting": "x" * 20_000_000}))
    client = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    with contextlib.closing(client):
        client.request("GET", "/")
        response = client.getresponse()
        assert len(response.read()) == int(response.headers["content-length"]) > 20_000_000
        client.request("GET", "/metrics")
        assert client.getresponse().status == 200


def test_more_clients_than_places(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow clients lose their places, the oldest first, and a scrape is answered."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
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
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
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
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    asked, go_on = threading.Event(), threading.Event()
    app = make_app()

    async def wait(_scope: pages.Scope) -> pages.Response:
        asked.set()
        await asyncio.to_thread(go_on.wait, PATIENCE_S)
        return pages.text(200, "at last")

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
    monkeypatch.setattr(connection, "MAX_UNTAKEN_BYTES", fit * page_bytes)
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


def test_memory_of_a_crowd_is_given_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When most have gone, and once for each crowd."""
    given = []
    monkeypatch.setattr(malloc, "give_back", lambda: given.append(True))
    port = start(make_app())
    for crowds in (1, 2):
        with contextlib.ExitStack() as opened:
            for _ in range(connection.CROWD):
                opened.enter_context(dial(port))
            ask(port, "/")
        while len(given) < crowds:
            ask(port, "/")
        for _ in range(5):
            ask(port, "/")
        assert len(given) == crowds


@pytest.mark.parametrize(
    "size", [connection.MAX_HEAD_BYTES + connection.READ_BYTES, 10_000_000]
)
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

    async def _wait(self, _scope: pages.Scope) -> pages.Response:
        self.asked.release()
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        return pages.text(200, "at last")


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
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.5)
    with dial(start(make_app(settings={"setting": "x" * 20_000_000}))) as sock:
        sock.sendall(LANDING)
        sock.shutdown(socket.SHUT_WR)
        assert until_refused(sock)


def test_fin_with_a_response_that_does_not_come(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of a request is for those that have closed their direction, too."""
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
    """A client that has sent FIN may be gone: it keeps no slot that another client needs.

    A fault of this kind lets clients that ask and leave take all slots for ten seconds.
    """
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
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
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, connection._RESET_ON_CLOSE)
    end = time.monotonic() + connection.REQUEST_TIMEOUT_S / 2
    while connections_in_memory() > 5:
        assert time.monotonic() < end
        ask(port, "/")


def connections_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, connection.Connection) for each in gc.get_objects())
