# SPDX-License-Identifier: GPL-3.0-only
"""Runs the event loop: accepts clients, and stops on a signal."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from tcpexporter.web.connection import protocol_factory
from tcpexporter.web.http_clients import HttpClients
from tcpexporter.web.listen import BACKLOG
from tcpexporter.web.pages import App

ACCEPTED_AT_ONCE = 32
"""Clients that asyncio accepts per listening socket in one turn of the event loop.

A request that has arrived when its client is accepted is read two turns later, and a
client with a request is not evicted while other clients have none. Three turns of two
sockets accept 192 clients, fewer than MAX_CONNECTIONS. So a client that sends its request
at once gets a response, however many clients of another source network connect. If many
connect from several networks, each network gets an equal share of the slots. Then only as
many clients of each network as its share are certain to get a response.
"""

GRACE_S = 0.3
"""Time that clients have to receive the rest of a response when the exporter stops."""

_TURNS_TO_CONNECT = 3
"""Turns of the event loop from accept(2) until `HttpClients` has the client."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_NO_CAPACITY = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accept(2) that pass when resources are freed."""

QUIET_S = 60.0
"""accept(2) must have worked for this long before its next error is logged again."""

Alongside = Callable[[], Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)


class Server:
    """Serves clients until ``stop`` is set."""

    def __init__(self, app: App) -> None:
        """Prepare to serve an application."""
        self.stop = asyncio.Event()
        self._app = app
        self._clients = HttpClients()

    async def serve(
        self, sockets: Sequence[socket.socket], alongside: Alongside | None = None
    ) -> None:
        """Accept clients until ``stop`` is set, then end within half a second.

        If ``alongside`` raises an exception, this stops and raises it.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_LoopErrors())
        make = protocol_factory(self._clients, self._app.respond, self._app.guard)
        servers = []
        for sock in sockets:
            servers.append(
                await loop.create_server(make, sock=sock, backlog=ACCEPTED_AT_ONCE)
            )
            # asyncio uses one number for the clients that it accepts at once and for the
            # kernel's queue, which has to be longer.
            sock.listen(BACKLOG)
        task = loop.create_task(alongside()) if alongside else None
        if task:
            task.add_done_callback(self._stop_if_failed)
        await self.stop.wait()
        if task:
            task.cancel()
        for each in servers:
            each.close()
        await self._shut_down()
        if task and task.done() and not task.cancelled():
            task.result()

    def _stop_if_failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception():
            self.stop.set()

    async def _shut_down(self) -> None:
        """Let clients receive responses that have begun, for GRACE_S at most."""
        for _ in range(_TURNS_TO_CONNECT):
            await asyncio.sleep(0)
        self._clients.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._clients.wait_until_none(), GRACE_S)
        self._clients.drop()
        if guard := self._app.guard:
            guard.cancel_checks()
        await asyncio.sleep(0)  # asyncio closes the sockets of dropped clients


class _LoopErrors:
    """Handles errors of the event loop; logs an error of accept(2) once, not each retry."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle one error, as `asyncio.loop.set_exception_handler` describes it."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_CAPACITY:
            if loop.time() - self._last_s > QUIET_S:
                log.warning("cannot accept new clients: %s", error.strerror)
            self._last_s = loop.time()
        elif "_start_serving" not in context["message"]:
            # _start_serving is asyncio's retry. It fails if listening has stopped by then.
            loop.default_exception_handler(context)


def serve(
    sockets: Sequence[socket.socket], app: App, alongside: Alongside | None = None
) -> signal.Signals:
    """Serve until SIGTERM or SIGINT, then return that signal within half a second.

    It blocks. So start the thread that makes the application ready before this call.

    Args:
        sockets: From `listen`; closed on return.
        app: Makes the responses.
        alongside: Runs in the same event loop; cancelled on the signal. An exception that
            it raises ends the server, and is raised here.
    """
    gc.freeze()  # existing objects stay: no need to scan them at each collection
    return asyncio.run(_serve_until_signal(sockets, app, alongside))


async def _serve_until_signal(
    sockets: Sequence[socket.socket], app: App, alongside: Alongside | None
) -> signal.Signals:
    server = Server(app)
    received = signal.SIGTERM

    def stop(number: signal.Signals) -> None:
        nonlocal received
        received = number
        server.stop.set()

    with _calling_on_signal(stop):
        await server.serve(sockets, alongside)
    return received


@contextlib.contextmanager
def _calling_on_signal(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Until the end of the block, call ``stop`` with SIGTERM or SIGINT when it arrives."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
