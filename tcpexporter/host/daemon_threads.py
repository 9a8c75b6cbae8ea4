# SPDX-License-Identifier: GPL-3.0-only
"""Runs native code (bcrypt) in daemon threads.

When Python exits, it unwinds the stacks of threads that still run. bcrypt is written in
Rust, which then aborts the whole process. So while such a thread runs, the process must
exit without Python's cleanup: see `exit_if_running`.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from tcpexporter.errors import NativeCodeError, reason
from tcpexporter.host import background

if (
    TYPE_CHECKING
):  # imported only when it is used, because every command imports this module
    import asyncio

_T = TypeVar("_T")
_NAME = "native code"


def in_thread(work: Callable[[], _T]) -> "asyncio.Future[_T]":
    """Start ``work`` in a thread, and return a future that gets its result.

    If ``work`` raises an error, the future gets a `NativeCodeError`. Cancelling the future
    does not wait for the thread.

    Raises:
        ThreadError: the kernel refuses another thread.
    """
    # The event loop has imported it.
    import asyncio  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def set_unless_cancelled(set_outcome: Callable[[], None]) -> None:
        if not outcome.done():
            set_outcome()

    def run() -> None:
        try:
            set_outcome = partial(outcome.set_result, work())
        except BaseException as error:
            set_outcome = partial(outcome.set_exception, NativeCodeError(reason(error)))
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(set_unless_cancelled, set_outcome)

    background.start(threading.Thread(target=run, name=_NAME, daemon=True))
    return outcome


def exit_if_running(code: int) -> None:
    """End the process with this exit code if such a thread still runs; otherwise return."""
    if any(each.name == _NAME for each in threading.enumerate()):
        logging.shutdown()
        os._exit(code)
