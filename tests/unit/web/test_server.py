# SPDX-License-Identifier: GPL-3.0-only
"""Accepting clients and stopping."""

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from tcpexporter.web import connection, server
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


def test_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that came with its client is answered, whatever crowd comes after it."""
    assert 3 * 2 * server.ACCEPTED_AT_ONCE < connection.MAX_CONNECTIONS
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3 * server.ACCEPTED_AT_ONCE + 1)
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    sockets = listen_at(LOOPBACK, 0)
    port = sockets[0].getsockname()[1]
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(dial(port))
        first.sendall(HEALTHY)
        for _ in range(2 * connection.MAX_CONNECTIONS):
            opened.enter_context(dial(port))
        opened.enter_context(serving(make_app(), sockets))
        read_until(first, b"healthy\n")
        ask(port, "/")  # the crowd is in: stopping while asyncio accepts makes it warn


def test_queue_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """More clients can wait in the kernel than asyncio accepts at once."""
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    sockets = listen_at(LOOPBACK, 0)
    with serving(make_app(), sockets):
        ask(sockets[0].getsockname()[1], "/")
        info = sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    # Of a listener, tcpi_sacked is the length of its queue: tcp_get_info() in
    # net/ipv4/tcp.c.
    (length,) = struct.unpack_from("I", info, 28)
    assert length > server.ACCEPTED_AT_ONCE


def test_accepting_again_when_nobody_listens_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio tries again a second after it could not; by then we may have stopped."""
    (listener,) = listen_at(LOOPBACK, 0)
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
