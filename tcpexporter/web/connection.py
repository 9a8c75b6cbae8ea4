# SPDX-License-Identifier: GPL-3.0-only
"""Speaks HTTP/1.1 with one client, within limits on its time and memory."""

import asyncio
import gc
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from tcpexporter.host import malloc
from tcpexporter.lean import part_of
from tcpexporter.web.fair_share import Places, neighbourhood

with part_of("uvicorn"):  # with its command line it takes 2 MiB more
    from uvicorn.protocols.http.h11_impl import H11Protocol

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

MAX_HEAD_BYTES = 16 * 1024
"""A request head that is not complete by then is refused; a scrape's has 300 bytes."""

READ_BYTES = 4 * 1024
"""Read from a client at once. asyncio's own 256 KiB would be 64 MiB for all of them."""

MAX_UNTAKEN_BYTES = 16 << 20
"""Of all responses together, what neither the clients nor the kernel have taken yet."""

# Dropping a client resets its connection: otherwise the kernel would go on for minutes
# trying to send what a client that does not read has left.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


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
            malloc.give_back()


class Connection(H11Protocol, asyncio.BufferedProtocol):
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
        self, places: "Places[Connection]", crowd: _Crowd, **of_uvicorn: Any
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

    def _all(self) -> "set[Connection]":
        return cast("set[Connection]", self.connections)

    def _is_asking(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _idle(self) -> bool:
        return self.timeout_keep_alive_task is not None and not self.transport.is_closing()


def protocol_factory(web: "Web | None") -> Callable[..., asyncio.BaseProtocol]:
    """What makes the protocol of a new connection."""
    plain = partial(Connection, Places[Connection](), _Crowd())
    if web is None or web.terms is None:
        return plain
    from tcpexporter.web.tls import TlsTransport  # noqa: PLC0415  # imported with web

    def secure(**of_uvicorn: Any) -> TlsTransport:
        assert web.terms is not None  # noqa: S101
        return TlsTransport(web.terms, plain(**of_uvicorn))

    return secure
