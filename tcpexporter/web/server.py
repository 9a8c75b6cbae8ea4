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

with part_of("uvicorn") as uvicorn:  # with its command line it takes 2 MiB more
    from uvicorn.config import Config

    vars(uvicorn).update(Config=Config)  # lifespan.off takes it from there

    # uvicorn imports it when it starts to serve. By then root is given up, and where the
    # exporter is installed may not be readable any more: below /root, for example.
    from uvicorn.lifespan import off as _off  # noqa: F401
    from uvicorn.server import HANDLED_SIGNALS, Server

ACCEPTED_AT_ONCE = 32
"""Clients accepted per address and turn of the event loop.

A request that came with its client is read two turns after the client got its place, and
who has asked keeps it. The clients of these three turns and two addresses are fewer than
MAX_CONNECTIONS: whoever asks at once is answered, however many others come from the same
neighbourhood (`places`). Where crowds come from several, each has its share of the places,
and of a crowd's own neighbours only as many are safe.
"""

GRACE_S = 0.3
"""What clients in the middle of a response get to take the rest of it when we stop."""

_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Why accept(2) may have to wait."""

SPELL_S = 60.0
"""Without trouble in accepting; new trouble is worth a new word."""

log = logging.getLogger(__name__)


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
        for each in list(cast("set[connection.Connection]", self.server_state.connections)):
            each.drop()
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


def _config(app: App) -> Config:
    return Config(
        app,
        interface="asgi3",
        http=cast("type[asyncio.Protocol]", connection.protocol_factory(app.web)),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are written at the pace of whoever sends garbage
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # kept right by the tick that we do without: ours is in `App`
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=connection.KEEP_ALIVE_S,
        h11_max_incomplete_event_size=connection.MAX_HEAD_BYTES,
    )
