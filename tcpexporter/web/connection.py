# SPDX-License-Identifier: GPL-3.0-only
"""Serves one HTTP/1.1 client, within limits on its time and memory."""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from tcpexporter.errors import reason
from tcpexporter.web.fair_share import source_network
from tcpexporter.web.http1 import Http1, InvalidRequestError, Request, Response, text
from tcpexporter.web.http_clients import HttpClients

if TYPE_CHECKING:  # saves the memory of bcrypt and ssl when there is no --web-config
    from tcpexporter.web.guard import Guard

REQUEST_TIMEOUT_S = 10.0
"""Time from the connect, before TLS, until the kernel has accepted the whole response.

For later requests it begins with the first byte of the request. Prometheus aborts a
scrape after 10 s by default, so it would not read a response that comes later.
"""

KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Scrape intervals are shorter: 15 to 60 s."""

MAX_HEAD_BYTES = 16 * 1024
"""Longer request heads are refused. The head of a scrape has 300 bytes."""

MAX_IGNORED_BYTES = 64 * 1024
"""Maximum number of body bytes that are read and discarded before a response is complete.

When a connection with unread data is closed, the kernel resets it, and the client can lose
the response.
"""

READ_BYTES = 4 * 1024
"""Size of a connection's read buffer. With asyncio's 256 KiB, 256 of them use 64 MiB."""

# Closing a socket with this SO_LINGER value resets the connection. Otherwise the kernel
# would try for minutes to send the remaining data to a client that does not read.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

Respond = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """The asyncio protocol of one client.

    A connection is busy from the connect, or from the first byte of a later request,
    until the kernel has accepted the whole response. After that it is idle.
    """

    network = ""
    """Source network of the client."""
    is_slow = False
    """Whether the kernel has not yet accepted all of a response."""
    _is_idle = False
    _is_reading = True
    _is_stopping = False
    """Whether the connection closes after the present response."""
    _has_sent_fin = False
    """Whether the client has closed its sending direction."""
    _transport: asyncio.Transport
    _http: Http1
    _buffer: bytearray
    _timer: asyncio.TimerHandle | None = None
    """Drops the client if it is busy for too long, closes the connection if idle."""
    _task: asyncio.Task[None]
    """Makes the response. The event loop itself keeps only weak references to tasks."""

    def __init__(self, clients: HttpClients, respond: Respond) -> None:
        """Prepare for a client.

        Args:
            clients: All clients, including this one while it is connected.
            respond: Makes the responses.
        """
        self._clients = clients
        self._respond = respond
        self._loop = asyncio.get_running_loop()

    # Called by asyncio or `TlsTransport`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Allocate a slot to the client. With TLS, this precedes the handshake."""
        self._transport = transport
        host, *_ = transport.get_extra_info("peername") or ("",)
        self.network = source_network(host)
        self._http = Http1(host, MAX_HEAD_BYTES, MAX_IGNORED_BYTES)
        # With a limit of 0, asyncio pauses writing whenever data remains in its buffer.
        transport.set_write_buffer_limits(0)
        self._buffer = bytearray(READ_BYTES)
        self._clients.add(self)
        self._set_timer(REQUEST_TIMEOUT_S, self.drop)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Free the slot, and cancel the timer: it would keep the connection in memory."""
        if self._timer:
            self._timer.cancel()
        self._clients.remove(self)
        self._clients.return_memory()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """Return the buffer that asyncio reads into."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that asyncio has read."""
        if self._is_idle:
            self._become_busy()
        self._http.receive(bytes(memoryview(self._buffer)[:nbytes]))
        self._process()

    def eof_received(self) -> bool:
        """Record that the client sends no more; return whether the connection stays open.

        The client may have closed its direction or the whole connection: the kernel
        reports both as the same event. So the client gets the responses to its requests
        within their deadline, but it may be evicted before (`is_being_answered`).
        """
        self._has_sent_fin = True
        if self._http.has_request:
            return True
        if self._http.has_incomplete_request:
            self._refuse(HTTPStatus.BAD_REQUEST)
        return False

    def pause_writing(self) -> None:
        """Limit the unsent data of all clients: the kernel accepts no more for this one."""
        self.is_slow = True
        self._clients.limit_unsent_data(self)

    def resume_writing(self) -> None:
        """Complete the response, as the kernel has accepted all its data."""
        self.is_slow = False
        if self._http.has_response:
            self._complete_response()

    # Called by `HttpClients`

    @property
    def is_being_answered(self) -> bool:
        """Whether the exporter is making a response, and the client has not sent FIN.

        A client that has sent FIN may be gone.
        """
        return self._http.has_request and not self.is_slow and not self._has_sent_fin

    @property
    def unsent_bytes(self) -> int:
        """Size of response data that the kernel has not accepted."""
        return self._transport.get_write_buffer_size()

    def stop(self) -> None:
        """Close the connection, after the response if there is a request."""
        if self._http.has_request:
            self._is_stopping = True
        else:
            self._transport.close()

    def drop(self) -> None:
        """Reset the connection at once; unsent data is discarded."""
        self._clients.remove(self)
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
        )
        self._transport.abort()

    # Requests and responses

    def _process(self) -> None:
        """Begin to respond to the next request, if it has arrived."""
        try:
            while request := self._http.next_request():
                self._task = self._loop.create_task(self._answer(request))
        except InvalidRequestError as error:
            self._refuse(error.status)
            return
        if self._is_reading != self._http.accepts_data:
            self._is_reading = self._http.accepts_data
            if self._is_reading:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._respond(request)
        except Exception as error:
            log.error("cannot make a response: %s", reason(error))  # noqa: TRY400
            log.debug("cannot make a response", exc_info=error)
            response = text(500, "internal server error", connection="close")
        if not self._transport.is_closing():
            self._send(response)
            self._complete_response()

    def _refuse(self, status: HTTPStatus) -> None:
        """Respond to input that is not HTTP; drop the client if a response has begun."""
        if self._http.has_request:
            self.drop()
            return
        sentence = f"the request is refused: {status.phrase.lower()}"
        self._send(text(status, sentence, connection="close"))

    def _send(self, response: Response) -> None:
        # Joined, so that one system call sends both. Not by writelines(): since Python 3.12
        # that never finishes an empty chunk, and some versions of 3.12 and 3.13 ignore the
        # limit of the write buffer (CPython gh-127655).
        self._transport.write(b"".join(self._http.encode(response)))
        if self._is_stopping or self._http.must_close:
            self._transport.close()

    def _complete_response(self) -> None:
        """Begin the next request or become idle, if the kernel has the whole response."""
        if self.is_slow:
            return  # resume_writing() calls this again
        if self._transport.is_closing():
            return  # the deadline still applies
        self._http.start_next()
        self._process()
        if self._http.has_request or self._transport.is_closing():
            self._become_busy()
        elif self._has_sent_fin:
            self._transport.close()
        else:
            self._become_idle()

    def _become_busy(self) -> None:
        self._is_idle = False
        self._clients.renew(self)
        self._set_timer(REQUEST_TIMEOUT_S, self.drop)

    def _become_idle(self) -> None:
        self._is_idle = True
        self._clients.renew(self)
        self._set_timer(KEEP_ALIVE_S, self._transport.close)

    def _set_timer(self, seconds: float, expire: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, expire)


def protocol_factory(
    clients: HttpClients, respond: Respond, guard: "Guard | None"
) -> Callable[[], asyncio.BaseProtocol]:
    """Return a function that makes the asyncio protocol of a new client.

    Args:
        clients: All clients.
        respond: Makes the responses.
        guard: With a TLS policy, the protocol is HTTP over TLS; otherwise it is HTTP.
    """
    if guard is None or guard.tls_policy is None:
        return lambda: Connection(clients, respond)
    from tcpexporter.web.tls import TlsTransport  # noqa: PLC0415  # guard has imported it

    def secure() -> TlsTransport:
        assert guard.tls_policy is not None  # noqa: S101
        return TlsTransport(guard.tls_policy, Connection(clients, respond))

    return secure
