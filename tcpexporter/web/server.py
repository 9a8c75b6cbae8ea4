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
from typing import Any, cast

from tcpexporter.lean import part_of
from tcpexporter.web import connection
from tcpexporter.web.listen import BACKLOG
from tcpexporter.web.pages import App

with part_of("uvicorn") as uvicorn:  # importing its command line too would take 2 MiB
    from uvicorn.config import Config

    vars(uvicorn).update(Config=Config)  # lifespan.off imports it from the package

    # uvicorn imports this module when it starts to serve. By then the exporter is not root,
    # and may not have permission to read where it is installed, for example below /root.
    from uvicorn.lifespan import off as _off  # noqa: F401
    from uvicorn.server import HANDLED_SIGNALS, Server

ACCEPTED_AT_ONCE = 32
"""Clients that asyncio accepts per listening socket in one turn of the event loop.

A request that has arrived when its client is accepted is read two turns later, and a
client with a request is not evicted while other clients have none. Three turns of two
sockets accept 192 clients, fewer than MAX_CONNECTIONS. So a client that sends its request
at once gets a response, however many clients of another source network connect. If many
connect from several networks, each network has its share of the slots; among clients of
one such network, only as many as its share are safe.
"""

GRACE_S = 0.3
"""Time that clients have to receive the rest of a response when the exporter stops."""

_NO_CAPACITY = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accept(2) that pass when resources are freed."""

QUIET_S = 60.0
"""accept(2) must have worked for this long before its next error is logged again."""

log = logging.getLogger(__name__)


class _Server(Server):
    """uvicorn's server, woken by a signal instead of polling for it ten times a second."""

    def __init__(
        self,
        config: Config,
        alongside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()
        self._alongside = alongside

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal; uvicorn would raise it again, which ends the process."""
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
        """Start serving, with a longer kernel queue than asyncio sets.

        asyncio uses one number for the queue and for the clients accepted at once.
        """
        asyncio.get_running_loop().set_exception_handler(_LoopErrors())
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)

    async def main_loop(self) -> None:
        """Wait for the signal to stop."""
        alongside = asyncio.create_task(self._alongside()) if self._alongside else None
        await self.stop.wait()
        if alongside:
            alongside.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients receive responses that have begun, for GRACE_S at most."""
        asyncio.get_running_loop().call_later(GRACE_S, self._drop_all)
        await super().shutdown(sockets)

    def _drop_all(self) -> None:
        for each in list(cast("set[connection.Connection]", self.server_state.connections)):
            each.drop()
        if guard := cast("App", self.config.app).guard:
            guard.cancel_checks()


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
            # _start_serving is asyncio's retry. It fails if listening has stopped since.
            loop.default_exception_handler(context)


def serve(
    sockets: Sequence[socket.socket],
    app: App,
    alongside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then return within half a second.

    Threads that work meanwhile, such as the one that gets ready, must be started before.

    Args:
        sockets: From `listen`; closed on return.
        app: Makes the responses.
        alongside: Runs in the same event loop; cancelled on the signal.
    """
    gc.freeze()  # existing objects stay: no need to scan them at each collection
    asyncio.run(_Server(_config(app), alongside).serve(list(sockets)))


def _config(app: App) -> Config:
    return Config(
        app,
        interface="asgi3",
        http=cast("type[asyncio.Protocol]", connection.protocol_factory(app.guard)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings would let clients fill the log with bad requests
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # needs uvicorn's polling to stay correct: `App` adds the date
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=connection.KEEP_ALIVE_S,
        h11_max_incomplete_event_size=connection.MAX_HEAD_BYTES,
    )
