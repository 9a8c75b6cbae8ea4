# SPDX-License-Identifier: GPL-3.0-only
"""Runs one attack on a server.

    python -m tests.hostile.attacks NAME PORT --clients NUMBER --seconds SECONDS

It writes the number of connections, requests and bytes as JSON.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import resource
import ssl
import sys
from dataclasses import dataclass

from tests.hostile.clients import CHUNK_BYTES, Behave, Client, run_clients

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_BYTES = 10_000_000_000

_numbers = itertools.count()


def _in_turn(*kinds: bytes) -> Behave:
    """Send these requests in turn, each on a new connection, and read each response."""
    turns = itertools.cycle(kinds)

    async def behave(client: Client) -> None:
        await client.send(next(turns), requests=1)
        await client.receive_for(0.5)

    return behave


async def _slow(client: Client) -> None:
    """Send a request at one byte per second."""
    await client.send(b"G", requests=1)
    for byte in itertools.chain(SCRAPE[1:] + b"X: ", itertools.repeat(ord("x"))):
        await client.receive_for(1)
        await client.send(bytes([byte]))


async def _idle(client: Client) -> None:
    """Send nothing, or one request and then nothing."""
    if next(_numbers) % 2:
        await client.send(HEALTHY, requests=1)
    await client.wait_until_dropped()


async def _head(client: Client) -> None:
    """Send an endless head as fast as the server reads it."""
    await client.send(SCRAPE, requests=1)
    for number in itertools.count():
        await client.send(b"X-%d: %s\r\n" % (number, b"x" * 1000))


async def _body(client: Client) -> None:
    """Send a body of 10 GB, with a length or in chunks, as fast as the server reads it."""
    number = next(_numbers)
    method = (b"POST", b"GET")[number // 2 % 2]
    head = SCRAPE.replace(b"GET", method)
    zeros = bytes(CHUNK_BYTES)
    if number % 2:
        framing, piece = b"Content-Length: %d" % BODY_BYTES, zeros
    else:
        framing, piece = b"Transfer-Encoding: chunked", b"10000\r\n%s\r\n" % zeros
    await client.send(head + framing + b"\r\n\r\n", requests=1)
    for _ in range(BODY_BYTES // CHUNK_BYTES):
        await client.send(piece)


async def _pipelining(client: Client) -> None:
    """Send batches of 50 requests; every second client reads none of the responses."""
    reads = next(_numbers) % 2
    while True:
        await client.send((SCRAPE + b"\r\n") * 50, requests=50)
        if reads:
            await client.receive_for(0.01)


_invalid = _in_turn(
    b"\r\n\r\n",
    b"\0" * 20_000,
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET  /  HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: what\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n",
    b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\0\r\n\r\n",
    HEALTHY + b"\x16",
    b"-" * 100 + b"\r\n\r\n",
)

_http2 = _in_turn(
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
    SCRAPE + b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
)


@functools.cache
def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def _handshake(client: Client) -> None:
    """Send half of a ClientHello, or a whole one, and then nothing more."""
    hello = _client_hello()
    half = len(hello) // 2 if next(_numbers) % 2 else len(hello)
    await client.send(hello[:half], requests=1)
    await client.wait_until_dropped()


async def _storm(client: Client) -> None:
    """Scrape without pause; every second client uses a new connection each time."""
    number = next(_numbers)
    closes = b"Connection: close\r\n" if number % 2 else b""
    packed = b"Accept-Encoding: gzip\r\n" if number // 2 % 2 else b""
    while True:
        await client.send(SCRAPE + closes + packed + b"\r\n", requests=1)
        await _read_page(client)


async def _forms(client: Client) -> None:
    """Scrape with a different query each time, so that no response can be reused."""
    while True:
        names = b"name[]=tcp_established_connections&name[]=x%d" % next(_numbers)
        query = SCRAPE.replace(b"/metrics", b"/metrics?" + names)
        await client.send(query + b"Accept-Encoding: gzip\r\n\r\n", requests=1)
        await _read_page(client)


async def _passwords(client: Client) -> None:
    """Send a different wrong password each time."""
    while True:
        tried = base64.b64encode(b"alice:%d" % next(_numbers))
        await client.send(SCRAPE + b"Authorization: Basic %s\r\n\r\n" % tried, requests=1)
        await _read_page(client)


async def _read_page(client: Client) -> None:
    head, found, body = b"", b"", b""
    while not found:
        head, found, body = (head + await client.receive()).partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length: ")
    left = int(length.partition(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(await client.receive())


@dataclass(frozen=True)
class Attack:
    """What the clients of an attack do, and how many there are."""

    text: str
    behave: Behave
    clients: int
    pause_s: float = 0.01
    """Pause of a client before it connects again."""
    web: str = ""
    """What the exporter must have configured: "tls", "passwords" or nothing."""


_pages = _in_turn(
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /api/v1/connections HTTP/1.1\r\nHost: x\r\n\r\n",
)
"""Load the status page and its data in turn."""

ATTACKS = {
    "slow": Attack("clients that send a byte a second", _slow, 1_000),
    "idle": Attack("idle connections", _idle, 10_000, pause_s=5),
    "head": Attack("heads without end", _head, 100),
    "body": Attack("bodies of 10 GB", _body, 100),
    "pipelining": Attack("pipelining, half of it unread", _pipelining, 200),
    "invalid": Attack("invalid HTTP", _invalid, 100),
    "http2": Attack("HTTP/2", _http2, 100),
    "storm": Attack("scrapes without pause", _storm, 200),
    "forms": Attack("scrapes of 200 kinds", _forms, 200),
    "pages": Attack("status pages without pause", _pages, 200),
    "handshake": Attack("half a TLS handshake", _handshake, 1_000, web="tls"),
    "passwords": Attack("wrong passwords", _passwords, 200, web="passwords"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.attacks")
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("port", type=int)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    chosen = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(most, chosen.clients + 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    attack = ATTACKS[chosen.name]
    done = asyncio.run(
        run_clients(
            chosen.port,
            attack.behave,
            clients=chosen.clients,
            seconds=chosen.seconds,
            pause_s=attack.pause_s,
        )
    )
    json.dump(dataclasses.asdict(done), sys.stdout)


if __name__ == "__main__":
    main()
