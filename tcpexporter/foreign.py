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
from typing import TypeVar

_T = TypeVar("_T")
_NAME = "foreign code"


def in_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Begin with ``work``, which does not raise; whoever cancels does not wait for it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T) -> None:
        if not outcome.done():
            outcome.set_result(result)

    def run() -> None:
        result = work()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result)

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    return outcome


def leave(code: int) -> None:
    """End the process with this exit code if a thread is at work; otherwise return."""
    if any(each.name == _NAME for each in threading.enumerate()):
        logging.shutdown()
        os._exit(code)
