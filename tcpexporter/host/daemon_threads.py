# SPDX-License-Identifier: GPL-3.0-only
"""Work of other languages in threads that nobody waits for at the end.

Python ends a thread that is left over by unwinding its stack; Rust, of which bcrypt is
made, then aborts the whole process. So where one is at work Python does not get to that.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tcpexporter.errors import ForeignError, reason
from tcpexporter.host import background

_T = TypeVar("_T")
_NAME = "foreign code"


def in_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Begin with ``work``; the future has its result or what it raises.

    Cancelling does not wait for it.

    Raises:
        ThreadError: there can be no thread.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def tell(tell_outcome: Callable[[], None]) -> None:
        if not outcome.done():
            tell_outcome()

    def run() -> None:
        try:
            told = partial(outcome.set_result, work())
        except BaseException as error:
            told = partial(outcome.set_exception, ForeignError(reason(error)))
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, told)

    background.start(threading.Thread(target=run, name=_NAME, daemon=True))
    return outcome


def leave(code: int) -> None:
    """End the process with this exit code if a thread is at work; otherwise return."""
    if any(each.name == _NAME for each in threading.enumerate()):
        logging.shutdown()
        os._exit(code)
