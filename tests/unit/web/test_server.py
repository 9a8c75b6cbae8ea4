# SPDX-License-Identifier: GPL-3.0-only
"""The server accepts clients, and stops."""

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from tcpexporter.web import http_clients, server
from tcpexporter.web.listen import listen as listen_at
from tests.unit.web.support import (
    HEALTHY,
    LANDING,
    LOOPBACK,
    PATIENCE_S,
    ask,
    dial,
    make_app,
    read_until,
    serving,
)


def test_a_request_sent_at_once_is_answered_even_if_many_clients_connect_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that sends its request right after connecting gets a response, even if many
    other clients connect.

    The other clients are twice as many as the slots.
    """
    assert 3 * 2 * server.ACCEPTED_AT_ONCE < http_clients.MAX_CONNECTIONS
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 3 * server.ACCEPTED_AT_ONCE + 1)
    sockets = listen_at(LOOPBACK, 0)
    port = sockets[0].getsockname()[1]
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(dial(port))
        first.sendall(HEALTHY)
        for _ in range(2 * http_clients.MAX_CONNECTIONS):
            opened.enter_context(dial(port))
        opened.enter_context(serving(make_app(), sockets))
        read_until(first, b"healthy\n")
        # all clients are accepted: asyncio would warn if it stopped while accepting
        ask(port, "/")


def test_the_kernel_queues_more_clients_than_are_accepted_at_once() -> None:
    """The listener's backlog is longer than ACCEPTED_AT_ONCE."""
    sockets = listen_at(LOOPBACK, 0)
    with serving(make_app(), sockets):
        ask(sockets[0].getsockname()[1], "/")
        info = sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    # For a listener, tcpi_sacked is its backlog: tcp_get_info() in net/ipv4/tcp.c.
    (length,) = struct.unpack_from("I", info, 28)
    assert length > server.ACCEPTED_AT_ONCE


def test_a_retry_of_accept_after_the_stop_is_not_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio retries accept(2) after a second; listening may have stopped by then."""
    (listener,) = listen_at(LOOPBACK, 0)
    listener.close()
    caplog.clear()

    async def try_again() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(server._LoopErrors())
        loop.call_soon(loop._start_serving, asyncio.Protocol, listener)  # type: ignore[attr-defined]
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    asyncio.run(try_again())
    (fault,) = caplog.messages
    assert "lambda" in fault


PROGRAM = """
import signal
from prometheus_client import CollectorRegistry
from tcpexporter.web import pages, server
from tcpexporter.web.listen import listen as listen_at

sockets = listen_at("127.0.0.1", 0)
print(sockets[0].getsockname()[1], flush=True)
settings = {"setting": "x" * 40_000_000}
app = pages.App(CollectorRegistry(), ready=lambda: None, settings=settings, version="1")
signal.signal(signal.SIGTERM, print)
signal.signal(signal.SIGINT, print)
server.serve(sockets, app)
assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is print
print("returned")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server(number: signal.Signals) -> None:
    """The server stops soon and logs nothing, whether clients are silent, idle, slow or
    reading."""
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


def test_a_failed_task_ends_the_server() -> None:
    """The exporter must not serve without its watchdog: the failure is raised."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError("a fault")

    sockets = listen_at(LOOPBACK, 0)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        server.serve(sockets, make_app(), fail)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_returns_the_signal_that_ended_it(number: signal.Signals) -> None:
    """The log names it."""

    async def send() -> None:
        signal.raise_signal(number)
        await asyncio.sleep(PATIENCE_S)

    assert server.serve(listen_at(LOOPBACK, 0), make_app(), send) == number
