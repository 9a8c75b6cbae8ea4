# SPDX-License-Identifier: GPL-3.0-only
"""HTTP: the metrics and the few pages beside them, which no client can keep from others."""

import asyncio
import base64
import contextlib
import errno
import gc
import hashlib
import logging
import math
import signal
import socket
import struct
import sys
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from html import escape
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from tcpexporter.errors import ServerError, SourceError, enough_memory, reason
from tcpexporter.host import malloc as memory
from tcpexporter.lean import part_of
from tcpexporter.metrics.exposition import Collections, Page, negotiate
from tcpexporter.metrics.negotiation import prefers_gzip
from tcpexporter.web.fair_share import Places, neighbourhood
from tcpexporter.web.targets import clean, is_host, location, path_of

with part_of("uvicorn") as uvicorn:  # with its command line it takes 2 MiB more
    from uvicorn.config import Config

    vars(uvicorn).update(Config=Config)  # lifespan.off takes it from there

    # uvicorn imports it when it starts to serve. By then root is given up, and where the
    # exporter is installed may not be readable any more: below /root, for example.
    from uvicorn.lifespan import off as _off  # noqa: F401
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.server import HANDLED_SIGNALS, Server

if TYPE_CHECKING:  # what is not asked for takes no memory
    from tcpexporter.web.guard import Web

REQUEST_TIMEOUT_S = 10.0
"""From connecting, before any TLS, or the first byte of a later request, until the
response is taken.

Prometheus gives up a scrape after 10 s unless told otherwise, so an answer that
takes longer has nobody waiting for it.
"""

KEEP_ALIVE_S = 75
"""A connection may wait this long for its next request: longer than between two scrapes."""

MAX_CONNECTIONS = 256
"""Far more than there are scrapers, far fewer than the 1,024 descriptors we may have."""

CROWD = 64
"""Connections that take so much memory that it is given back when most have gone."""

ACCEPTED_AT_ONCE = 32
"""Clients accepted per address and turn of the event loop.

A request that came with its client is read two turns after the client got its place, and
who has asked keeps it. The clients of these three turns and two addresses are fewer than
MAX_CONNECTIONS: whoever asks at once is answered, however many others come from the same
neighbourhood (`places`). Where crowds come from several, each has its share of the places,
and of a crowd's own neighbours only as many are safe.
"""

BACKLOG = 1024
"""Clients that wait in the kernel to be accepted; others try again after a second."""

MAX_HEAD_BYTES = 16 * 1024
"""A request head that is not complete by then is refused; a scrape's has 300 bytes."""

READ_BYTES = 4 * 1024
"""Read from a client at once. asyncio's own 256 KiB would be 64 MiB for all of them."""

MAX_UNTAKEN_BYTES = 16 << 20
"""Of all responses together, what neither the clients nor the kernel have taken yet."""

RECEIVE_BYTES, SEND_BYTES = 32 * 1024, 128 * 1024
"""What the kernel keeps for a client at most; by socket(7) it takes twice that for it.

By itself it goes up to some MiB for each, and all that the host's connections may take
together is limited: whoever fills that makes every service of the host slow.
"""

GRACE_S = 0.3
"""What clients in the middle of a response get to take the rest of it when we stop."""

# Dropping a client resets its connection: otherwise the kernel would go on for minutes
# trying to send what a client that does not read has left.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Why accept(2) may have to wait."""

SPELL_S = 60.0
"""Without trouble in accepting; new trouble is worth a new word."""

# What getaddrinfo(3) names but this host does not have, IPv6 mostly.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_REMEDIES = {
    errno.EADDRINUSE: "port {port} is already in use:"
    " stop what uses it or choose another with --listen",
    errno.EACCES: "port {port} is not permitted:"
    " start as root or choose one of 1024 or above with --listen",
    errno.EADDRNOTAVAIL: "{address} is not an address of this host:"
    " choose with --listen one that `ip address` shows",
    errno.EAFNOSUPPORT: "{address} needs IPv6, which this host does not have:"
    " choose an IPv4 address with --listen",
}

_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { max-width: 42rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
th, td { padding: .2rem 2rem .2rem 0; text-align: left; vertical-align: top }
th { font-weight: normal }
td { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

# Nothing but our own style: the page shows what a user wrote.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{_STYLE_HASH}'"
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_Address = tuple[Any, ...]

log = logging.getLogger(__name__)


def listen(address: str | None, port: int) -> list[socket.socket]:
    """Listen at an address or a host name; what the host does not have of it is left out.

    Args:
        address: None is every address of the host, IPv4 and IPv6; so is ``::``, as for
            exporters that are written in Go. ``0.0.0.0`` is IPv4 alone.
        port: 0 takes a free one, the same at all addresses.

    Returns:
        One listening socket per address.

    Raises:
        ServerError: the port cannot be had at one of the addresses.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    # A socket for each family, not one for both: its IPv4 clients would all have addresses
    # of one IPv6 network, ::ffff:0:0/96, and share the slots of one (`places`).
    where = None if address == "::" else address
    try:
        for family, (host, _, *scope) in _resolve(where, port):
            try:
                sockets.append(_bind(family, (host, port, *scope)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                absent = error
            else:
                port = sockets[-1].getsockname()[1]
        if absent and not sockets:
            raise absent
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _refusal(error, address, port) from error
    return sockets


def _resolve(address: str | None, port: int) -> list[tuple[socket.AddressFamily, _Address]]:
    try:
        found = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ServerError(
            f"{address} is not known: give an address or a name of this host with --listen"
        ) from error
    # A name that /etc/hosts has twice is found twice, and cannot be bound twice.
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _bind(family: socket.AddressFamily, sockaddr: _Address) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where it is told that this is TCP. With it,
    # the end of a page waits for the client's delayed ACK: 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if family == socket.AF_INET6:
            # IPv4 has its own socket, whatever net.ipv6.bindv6only says.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    log.info("listening on %s, port %s", *sock.getsockname()[:2])
    return sock


def _refusal(error: OSError, address: str | None, port: int) -> ServerError:
    sentence = _REMEDIES.get(
        error.errno or 0, f"cannot listen at {{address}} on port {{port}}: {error.strerror}"
    )
    return ServerError(sentence.format(address=address or "any address", port=port))


@dataclass(frozen=True)
class _Response:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def _text(status: int, sentence: str, **headers: str) -> _Response:
    return _Response(status, f"{sentence}\n".encode(), headers=headers)


_ALLOW = {"allow": "GET, HEAD"}

_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: _text(
        401,
        "who are you? A name and its password are needed",
        **{"www-authenticate": 'Basic realm="tcpexporter", charset="UTF-8"'},
    ),
    HTTPStatus.TOO_MANY_REQUESTS: _text(429, "too many requests for the rate_limit"),
    HTTPStatus.SERVICE_UNAVAILABLE: _text(
        503, "the password cannot be checked now: try again", **{"retry-after": "1"}
    ),
}
"""Of a request that `web.Web` does not admit."""


class App:
    """The pages, as an ASGI application."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        ready: Callable[[], str | None],
        settings: Mapping[str, object],
        version: str,
        web: "Web | None" = None,
    ) -> None:
        """Serve what a registry collects.

        Args:
            registry: Asked anew for scrapes that come at the same time, in the event loop.
            ready: What is waited for before there are metrics, None when there are.
            settings: Shown on the landing page.
            version: Likewise.
            web: Guards every page; None: anybody may ask.
        """
        self._collections = Collections(registry)
        self.web = web
        self._ready = ready
        self._version = version
        self.show(settings)
        self._trouble: str | None = None
        self._has_worked = False
        self._pages: Mapping[str, Callable[[Scope], Awaitable[_Response]]] = {
            "/": self._landing,
            "/metrics": self._metrics,
            "/-/healthy": self._health,
            "/-/ready": self._readiness,
        }

    def show(self, settings: Mapping[str, object]) -> None:
        """Have other settings on the landing page; from any thread."""
        self._landing_page = _landing_page(self._version, settings).encode()

    async def check(self) -> str | None:
        """What keeps metrics from being had; None: nothing does.

        Collects as for a scrape, unless there was one that worked since the last check.
        """
        if awaited := self._ready():
            return awaited
        try:
            if not self._has_worked:
                await self.collect()
        except SourceError as error:
            return str(error)
        self._has_worked = False
        return None

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        response = (
            _objection(scope) or await self._refusal(scope) or await self._respond(scope)
        )
        headers = {
            "date": formatdate(usegmt=True),
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            **response.headers,
            **(self.web.headers if self.web else {}),
        }
        if _has_body(scope):
            # Nobody reads it, so there is no telling where the next request begins.
            headers["connection"] = "close"
        await send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": response.body})

    async def collect(self) -> Page:
        """A page of now, shared with whoever asks at the same time.

        Raises:
            SourceError: there is none.
        """
        try:
            page = await self._collections.next()
        except Exception as error:
            self._note(reason(error))
            log.debug("no metrics can be had", exc_info=error)
            raise SourceError(reason(error)) from error
        self._note(None)
        self._has_worked = True
        return page

    async def _refusal(self, scope: Scope) -> _Response | None:
        if self.web is None:
            return None
        host, _ = scope["client"] or ("", 0)
        authorization = _header(scope, b"authorization")
        return _REFUSALS.get(await self.web.admit(authorization, neighbourhood(host)))

    async def _respond(self, scope: Scope) -> _Response:
        target = scope["raw_path"].decode("ascii")
        if (scope["method"], target) == ("OPTIONS", "*"):  # of the server as a whole
            return _Response(200, b"", headers=_ALLOW)
        if scope["method"] not in ("GET", "HEAD"):
            return _text(405, "only GET and HEAD are allowed", **_ALLOW)
        path = path_of(target)
        if path is None:
            return _text(400, "the request target is neither a path nor a URL")
        if path != (cleaned := clean(path)):
            where = location(cleaned, scope["query_string"].decode("ascii"))
            return _text(301, f"moved permanently: {where}", location=where)
        if page := self._pages.get(path):
            return await page(scope)
        return _text(404, "not found: the metrics are at /metrics")

    async def _landing(self, _scope: Scope) -> _Response:
        return _Response(
            200,
            self._landing_page,
            "text/html; charset=utf-8",
            {"content-security-policy": _CONTENT_SECURITY_POLICY},
        )

    async def _health(self, _scope: Scope) -> _Response:
        return _text(200, "healthy")

    async def _readiness(self, _scope: Scope) -> _Response:
        awaited = self._ready()
        return _text(503, f"not ready: {awaited}") if awaited else _text(200, "ready")

    async def _metrics(self, scope: Scope) -> _Response:
        readiness = await self._readiness(scope)
        if readiness.status != 200:
            return readiness
        try:
            page = await self.collect()
            with enough_memory():
                return _exposition(page, scope)
        except SourceError as error:
            return _text(503, str(error))

    def _note(self, trouble: str | None) -> None:
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble:
            log.error("no metrics can be had: %s", trouble)
        else:
            log.info("metrics can be had again")


def _objection(scope: Scope) -> _Response | None:
    """The response to a request that is invalid whatever its target; None: it is valid."""
    if not scope["http_version"].startswith("1."):
        return _text(505, "only HTTP/1.0 and HTTP/1.1 are supported", connection="close")
    if not is_host(_header(scope, b"host")):
        return _text(400, "the Host header is invalid")
    if _header(scope, b"expect").lower() not in ("", "100-continue"):
        return _text(417, "only 100-continue may be expected")
    return None


def _exposition(page: Page, scope: Scope) -> _Response:
    form = negotiate(_header(scope, b"accept"))
    query = parse_qs(scope["query_string"].decode("latin-1"))
    if names := query.get("name[]"):
        # Not compressed, or every choice of names would have to be compressed anew.
        vary = {"vary": "Accept"}
        return _Response(200, page.body(form, names), form.content_type, vary)
    vary = {"vary": "Accept, Accept-Encoding"}
    if not prefers_gzip(_header(scope, b"accept-encoding")):
        return _Response(200, page.body(form), form.content_type, vary)
    packing = {"content-encoding": "gzip", **vary}
    return _Response(200, page.packed(form), form.content_type, packing)


def _header(scope: Scope, name: bytes) -> str:
    return b",".join(value for key, value in scope["headers"] if key == name).decode(
        "latin-1"
    )


def _has_body(scope: Scope) -> bool:
    length = _header(scope, b"content-length")
    return length not in ("", "0") or bool(_header(scope, b"transfer-encoding"))


def _landing_page(version: str, settings: Mapping[str, object]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_shown(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tcpexporter</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>tcpexporter {escape(version)}</h1>
<p>How many TCP connections have lasted for long, per local port and IP version.</p>
<ul>
<li><a href="metrics">Metrics</a></li>
<li><a href="-/healthy">Health</a>: does it run?</li>
<li><a href="-/ready">Readiness</a>: does it have metrics?</li>
</ul>
<h2>Settings in force</h2>
<table>
{rows}
</table>
</body>
</html>
"""


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "not set"
    return "not set" if value is None else str(value)


class _Crowd:
    """Sees to it that no memory is kept for a crowd that has gone."""

    def __init__(self) -> None:
        self._was_there = False

    def note(self, connections: int) -> None:
        if connections >= CROWD:
            self._was_there = True
        elif self._was_there and connections <= CROWD // 4:
            self._was_there = False
            gc.collect()  # what a connection had refers to itself
            memory.return_memory()


class _Connection(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1, with bounds on the time and memory that a client can take.

    A connection is busy from its first moment, later from the first byte of a request,
    until its response is taken; it is idle from then on. Only busy ones have a deadline
    of ours: uvicorn closes the idle ones.
    """

    _where = ""
    _has_ended = False
    """Whether the client sends no more."""
    _deadline: asyncio.TimerHandle
    _buffer: bytearray

    def __init__(
        self, places: "Places[_Connection]", crowd: _Crowd, **of_uvicorn: Any
    ) -> None:
        """One connection, which takes one of the places when it is there."""
        super().__init__(**of_uvicorn)
        self._places = places
        self._crowd = crowd

    def take_place(self, transport: asyncio.Transport) -> None:
        """Find a place for the client, if need be that of another."""
        if len(self.connections) >= MAX_CONNECTIONS:
            self._make_room()
        self.connections.add(self)
        self.transport = transport
        host, *_ = transport.get_extra_info("peername") or ("",)
        self._where = neighbourhood(host)
        # With no room in the buffer, "writing is paused" means "not all taken yet".
        transport.set_write_buffer_limits(0)
        self._buffer = bytearray(READ_BYTES)
        self._begin()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin with HTTP; `TlsTransport` has taken the place before its handshake."""
        if self.transport is None:
            self.take_place(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind: it would keep all that the connection has in memory."""
        self._deadline.cancel()
        self._places.leave(self, self._where)
        super().connection_lost(exc)
        # uvicorn does this only when there was no error.
        self._unset_keepalive_if_required()
        self._crowd.note(len(self.connections))

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """Have asyncio read into this."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what asyncio has read."""
        if self._idle():
            self._begin()
        self.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:  # type: ignore[override]
        """Record that the client sends no more; whether the connection stays open.

        The client may have closed its direction or the whole connection: the kernel does
        not tell which. So it gets the responses to its requests within their deadline, but
        until then its slot is free for clients that need one (`is_answered`).
        """
        self._has_ended = True
        if self._is_asking():
            return True
        if self.conn.trailing_data[0]:
            self.send_400_response("the request has no end")
        return False

    def on_response_complete(self) -> None:
        """Become idle, or go on to a request that was sent without waiting."""
        if self.flow.write_paused:
            return  # resume_writing() comes back to it
        self._deadline.cancel()
        self._wait()
        super().on_response_complete()
        if not self._idle():
            self._begin()
        elif self._has_ended:
            self.transport.close()

    def pause_writing(self) -> None:
        """Note that not all that was written is taken; there may be too much of that."""
        super().pause_writing()
        others = self._all() - {self}
        untaken = sum(each.transport.get_write_buffer_size() for each in others)
        if untaken > MAX_UNTAKEN_BYTES:
            slow = self._places.dispensable(lambda each: each in others and each.is_slow)
            if slow:
                slow.drop()

    def resume_writing(self) -> None:
        """Note that all that was written is taken."""
        super().resume_writing()
        if self.cycle is not None and self.cycle.response_complete:
            self.on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; in the middle of a response there is no way to.

        uvicorn calls this while it handles h11's error, which knows a better status for a
        head that is too long (431) and for an unknown transfer coding (501).
        """
        if self._is_asking():
            self.drop()
            return
        status = HTTPStatus(getattr(sys.exception(), "error_status_hint", 400))
        self.transport.write(
            f"HTTP/1.1 {status} {status.phrase}\r\n"
            "content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
            f"content-length: {len(msg)}\r\n\r\n{msg}".encode()
        )
        self.transport.close()

    @property
    def is_slow(self) -> bool:
        """Whether it has not taken all of a response."""
        return self.flow is not None and self.flow.write_paused

    @property
    def is_answered(self) -> bool:
        """Whether a response is being made for a client that has not closed its side."""
        return self._is_asking() and not self.is_slow and not self._has_ended

    def drop(self) -> None:
        """Close the connection at once, whatever is still to be sent."""
        self.connections.discard(self)
        self._places.leave(self, self._where)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
        self.transport.abort()

    def _make_room(self) -> None:
        # Who has asked is answered in a few turns of the event loop, but for a few whose
        # password is to be checked.
        for may_go in (lambda each: not each.is_answered, lambda _: True):
            if other := self._places.dispensable(may_go):
                other.drop()
                return

    def _begin(self) -> None:
        self._wait()
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self.drop)

    def _wait(self) -> None:
        self._places.take(self, self._where, self.loop.time())

    def _all(self) -> "set[_Connection]":
        return cast("set[_Connection]", self.connections)

    def _is_asking(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _idle(self) -> bool:
        return self.timeout_keep_alive_task is not None and not self.transport.is_closing()


class _Server(Server):
    """uvicorn's, woken by a signal: its own looks for one ten times a second."""

    def __init__(
        self, config: Config, beside: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()
        self._beside = beside

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal: uvicorn's would also raise it again, and so kill us."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
        for number in before:
            loop.add_signal_handler(number, self.stop.set)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let more clients wait in the kernel than asyncio, by itself, accepts at once."""
        asyncio.get_running_loop().set_exception_handler(_Accepting())
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)

    async def main_loop(self) -> None:
        """Wait until told to stop."""
        beside = asyncio.create_task(self._beside()) if self._beside else None
        await self.stop.wait()
        if beside:
            beside.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients take what was begun, but not for long."""
        asyncio.get_running_loop().call_later(GRACE_S, self._drop_all)
        await super().shutdown(sockets)

    def _drop_all(self) -> None:
        for connection in list(cast("set[_Connection]", self.server_state.connections)):
            connection.drop()
        if web := cast("App", self.config.app).web:
            web.give_up()


class _Accepting:
    """What the event loop cannot do: of clients that have to wait it is said once."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Do instead of asyncio, which would say it as often as it tries to accept."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_MORE:
            if loop.time() - self._last_s > SPELL_S:
                log.warning(
                    "new clients have to wait until others are gone, or limits raised: %s",
                    error.strerror,
                )
            self._last_s = loop.time()
        elif "_start_serving" not in context["message"]:
            # That one is its next try, when we have stopped listening meanwhile.
            loop.default_exception_handler(context)


def serve(
    sockets: Sequence[socket.socket],
    app: App,
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then return within half a second.

    Whoever has something to do meanwhile, such as getting ready, starts a thread before.

    Args:
        sockets: From `listen`; closed on return.
        app: What answers.
        beside: What runs meanwhile in the same event loop; cancelled at the end.
    """
    gc.freeze()  # nobody needs to look through what is there already
    asyncio.run(_Server(_config(app), beside).serve(list(sockets)))


def _protocol(web: "Web | None") -> Callable[..., asyncio.BaseProtocol]:
    """What makes the protocol of a new connection."""
    plain = partial(_Connection, Places[_Connection](), _Crowd())
    if web is None or web.terms is None:
        return plain
    from tcpexporter.web.tls import TlsTransport  # noqa: PLC0415  # imported with web

    def secure(**of_uvicorn: Any) -> TlsTransport:
        assert web.terms is not None  # noqa: S101
        return TlsTransport(web.terms, plain(**of_uvicorn))

    return secure


def _config(app: App) -> Config:
    return Config(
        app,
        interface="asgi3",
        http=cast("type[asyncio.Protocol]", _protocol(app.web)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are written at the pace of whoever sends garbage
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # kept right by the tick that we do without: ours is in `App`
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
