# SPDX-License-Identifier: GPL-3.0-only
"""What clients can do to a server, each as a program of its own.

    python -m tests.hostile.attacks NAME PORT --clients NUMBER --seconds SECONDS

It writes in JSON what it has done.
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

from tests.hostile.crowd import CHUNK_BYTES, Behave, Client, crowd

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
HEALTHY = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_BYTES = 10_000_000_000

_numbers = itertools.count()


def _in_turn(*kinds: bytes) -> Behave:
    """Send one after another, each on a connection of its own, and take what comes."""
    turns = itertools.cycle(kinds)

    async def behave(client: Client) -> None:
        await client.send(next(turns), requests=1)
        await client.receive_for(0.5)

    return behave


async def _slow(client: Client) -> None:
    """A request that comes byte by byte, one a second."""
    await client.send(b"G", requests=1)
    for byte in itertools.chain(SCRAPE[1:] + b"X: ", itertools.repeat(ord("x"))):
        await client.receive_for(1)
        await client.send(bytes([byte]))


async def _idle(client: Client) -> None:
    """Nothing at all, or nothing more after a first request."""
    if next(_numbers) % 2:
        await client.send(HEALTHY, requests=1)
    await client.wait_until_dropped()


async def _head(client: Client) -> None:
    """A head without end, as fast as it is taken."""
    await client.send(SCRAPE, requests=1)
    for number in itertools.count():
        await client.send(b"X-%d: %s\r\n" % (number, b"x" * 1000))


async def _body(client: Client) -> None:
    """A body of 10 GB, declared or in chunks, as fast as it is taken."""
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
    """Many requests at once, again and again; every second client reads no answer."""
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
    """Half of a first message; or all of it, and nothing after the answer."""
    hello = _client_hello()
    half = len(hello) // 2 if next(_numbers) % 2 else len(hello)
    await client.send(hello[:half], requests=1)
    await client.wait_until_dropped()


async def _storm(client: Client) -> None:
    """Scrapes without pause; every second client has a connection for each."""
    number = next(_numbers)
    closes = b"Connection: close\r\n" if number % 2 else b""
    packed = b"Accept-Encoding: gzip\r\n" if number // 2 % 2 else b""
    while True:
        await client.send(SCRAPE + closes + packed + b"\r\n", requests=1)
        await _take_page(client)


async def _forms(client: Client) -> None:
    """Scrapes that each ask for something else, which nobody can share."""
    while True:
        names = b"name[]=tcp_established_connections&name[]=x%d" % next(_numbers)
        query = SCRAPE.replace(b"/metrics", b"/metrics?" + names)
        await client.send(query + b"Accept-Encoding: gzip\r\n\r\n", requests=1)
        await _take_page(client)


async def _passwords(client: Client) -> None:
    """One wrong password after another."""
    while True:
        tried = base64.b64encode(b"alice:%d" % next(_numbers))
        await client.send(SCRAPE + b"Authorization: Basic %s\r\n\r\n" % tried, requests=1)
        await _take_page(client)


async def _take_page(client: Client) -> None:
    head, found, body = b"", b"", b""
    while not found:
        head, found, body = (head + await client.receive()).partition(b"\r\n\r\n")
    _, _, told = head.lower().partition(b"content-length: ")
    left = int(told.partition(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(await client.receive())


@dataclass(frozen=True)
class Attack:
    """What clients do, and how many they are."""

    text: str
    behave: Behave
    clients: int
    pause_s: float = 0.01
    """Before a client whose connection has ended makes another."""
    web: str = ""
    """What the exporter must have: "tls" or "passwords"."""


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
        crowd(
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
