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
from tcpexporter.web.fair_share import ConnectionSlots, source_network

with part_of("uvicorn"):  # importing its command line too would take 2 MiB
    from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:  # saves the memory of bcrypt and ssl when there is no --web-config
    from tcpexporter.web.guard import Guard

REQUEST_TIMEOUT_S = 10.0
"""Time from the connect, before TLS, until the client has received the first response.

For later requests it begins with the first byte of the request. Prometheus aborts a
scrape after 10 s by default, so a later response would not be read.
"""

KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Scrape intervals are shorter: 15 to 60 s."""

MAX_CONNECTIONS = 256
"""Far more than there are scrapers, far fewer than the usual 1,024 file descriptors."""

MANY_CONNECTIONS = 64
"""From this number on, freed memory is returned to the kernel when most are closed."""

MAX_HEAD_BYTES = 16 * 1024
"""Longer request heads are refused. The head of a scrape has 300 bytes."""

READ_BYTES = 4 * 1024
"""Size of a connection's read buffer. asyncio's 256 KiB would be 64 MiB for all of them."""

MAX_UNSENT_BYTES = 16 << 20
"""Limit for response data that the kernel has not accepted, of all clients together."""

# Closing a socket with this SO_LINGER value resets the connection. Otherwise the kernel
# would try for minutes to send the remaining data to a client that does not read.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _MemoryReturn:
    """Returns memory to the kernel after many connections were open."""

    def __init__(self) -> None:
        self._were_many = False

    def update(self, connections: int) -> None:
        """Call this when a connection has closed; ``connections`` are still open."""
        if connections >= MANY_CONNECTIONS:
            self._were_many = True
        elif self._were_many and connections <= MANY_CONNECTIONS // 4:
            self._were_many = False
            gc.collect()  # the objects of a connection refer to each other
            malloc.return_memory()


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1 protocol with limits on the time and memory of a client.

    A connection is busy from the connect, or from the first byte of a later request,
    until the client has received the response. After that it is idle. The deadline here is
    for busy connections; uvicorn closes idle ones after KEEP_ALIVE_S.
    """

    _network = ""
    _has_sent_fin = False
    """Whether the client has closed its sending direction."""
    _deadline: asyncio.TimerHandle
    _buffer: bytearray

    def __init__(
        self,
        slots: "ConnectionSlots[Connection]",
        memory_return: _MemoryReturn,
        **of_uvicorn: Any,
    ) -> None:
        """Prepare for a client.

        Args:
            slots: Slots of all connections, shared by them.
            memory_return: Shared by all connections.
            of_uvicorn: Arguments of uvicorn's protocol.
        """
        super().__init__(**of_uvicorn)
        self._slots = slots
        self._memory_return = memory_return

    def allocate_slot(self, transport: asyncio.Transport) -> None:
        """Allocate a slot to the client; if all are taken, evict another client."""
        if len(self.connections) >= MAX_CONNECTIONS:
            self._evict_one()
        self.connections.add(self)
        self.transport = transport
        host, *_ = transport.get_extra_info("peername") or ("",)
        self._network = source_network(host)
        # With a limit of 0, writing is paused whenever the kernel has not accepted all.
        transport.set_write_buffer_limits(0)
        self._buffer = bytearray(READ_BYTES)
        self._become_busy()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start HTTP. With TLS, the slot was allocated before the handshake."""
        if self.transport is None:
            self.allocate_slot(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the slot, and cancel timers: they would keep the connection in memory."""
        self._deadline.cancel()
        self._slots.free(self, self._network)
        super().connection_lost(exc)
        # uvicorn does this only if the connection was lost without an error.
        self._unset_keepalive_if_required()
        self._memory_return.update(len(self.connections))

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """Return the buffer that asyncio reads into."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that asyncio has read."""
        if self._is_idle():
            self._become_busy()
        self.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:  # type: ignore[override]
        """Record that the client sends no more; return whether the connection stays open.

        The client may have closed its direction or the whole connection: the kernel
        reports both as the same event. So the client gets the responses to its requests
        within their deadline, but it may be evicted before (`is_being_answered`).
        """
        self._has_sent_fin = True
        if self._has_request():
            return True
        if self.conn.trailing_data[0]:
            self.send_400_response("the request is incomplete")
        return False

    def on_response_complete(self) -> None:
        """Become idle, or continue with the next pipelined request."""
        if self.flow.write_paused:
            return  # resume_writing() calls this again
        self._deadline.cancel()
        self._renew_slot()
        super().on_response_complete()
        if not self._is_idle():
            self._become_busy()
        elif self._has_sent_fin:
            self.transport.close()

    def pause_writing(self) -> None:
        """Called when the kernel accepts no more data: limit unsent data of all clients."""
        super().pause_writing()
        others = self._all() - {self}
        unsent = sum(each.transport.get_write_buffer_size() for each in others)
        if unsent > MAX_UNSENT_BYTES:
            slow = self._slots.evictable(lambda each: each in others and each.is_slow)
            if slow:
                slow.drop()

    def resume_writing(self) -> None:
        """Called when the kernel has accepted all data: complete the response."""
        super().resume_writing()
        if self.cycle is not None and self.cycle.response_complete:
            self.on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP; in the middle of a response, drop the client.

        uvicorn calls this while it handles h11's error, which has a more exact status for a
        head that is too long (431) and for an unknown transfer coding (501).
        """
        if self._has_request():
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
        """Whether the kernel has not yet accepted all of a response."""
        return self.flow is not None and self.flow.write_paused

    @property
    def is_being_answered(self) -> bool:
        """Whether the exporter is making a response, and the client has not sent FIN.

        A client that has sent FIN may be gone.
        """
        return self._has_request() and not self.is_slow and not self._has_sent_fin

    def drop(self) -> None:
        """Reset the connection at once; unsent data is discarded."""
        self.connections.discard(self)
        self._slots.free(self, self._network)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
        self.transport.abort()

    def _evict_one(self) -> None:
        # Clients that are being answered come last: the response takes a few turns of the
        # event loop, and longer only while a password is checked.
        for may_evict in (lambda each: not each.is_being_answered, lambda _: True):
            if evicted := self._slots.evictable(may_evict):
                evicted.drop()
                return

    def _become_busy(self) -> None:
        self._renew_slot()
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self.drop)

    def _renew_slot(self) -> None:
        self._slots.hold(self, self._network, self.loop.time())

    def _all(self) -> "set[Connection]":
        return cast("set[Connection]", self.connections)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_idle(self) -> bool:
        return self.timeout_keep_alive_task is not None and not self.transport.is_closing()


def protocol_factory(guard: "Guard | None") -> Callable[..., asyncio.BaseProtocol]:
    """Return a function that makes the asyncio protocol of a new client.

    Args:
        guard: None, or one without TLS: the protocol is HTTP; otherwise HTTP over TLS.
    """
    plain = partial(Connection, ConnectionSlots[Connection](), _MemoryReturn())
    if guard is None or guard.tls_policy is None:
        return plain
    from tcpexporter.web.tls import TlsTransport  # noqa: PLC0415  # imported with guard

    def secure(**of_uvicorn: Any) -> TlsTransport:
        assert guard.tls_policy is not None  # noqa: S101
        return TlsTransport(guard.tls_policy, plain(**of_uvicorn))

    return secure
