# SPDX-License-Identifier: GPL-3.0-only
"""Runs a function in another network namespace, in a thread of its own."""

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from tcpexporter.host import background, namespaces
from tcpexporter.lean import part_of

with part_of("pyroute2"):  # importing all of it would use 8 MiB more
    from pyroute2 import netns as pyroute2_netns

T = TypeVar("T")


def run_in_netns(netns: int, function: Callable[[], T]) -> T:
    """Call ``function`` in a network namespace, and return its result.

    A new thread enters the namespace, calls the function and ends: setns(2) moves only the
    calling thread.

    Args:
        netns: a descriptor of the namespace.
        function: the function to call. An exception that it raises is raised here, too.

    Raises:
        ThreadError: the kernel refuses another thread.
        OSError: the kernel refuses to move the thread into the namespace.
    """
    if os.fstat(netns).st_ino == namespaces.inode():
        return function()
    outcome: list[T | Exception] = []

    def enter_and_call() -> None:
        try:
            _enter(netns)
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=enter_and_call)
    background.start(thread)
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _enter(netns: int) -> None:
    try:
        pyroute2_netns.setns(netns)
    except OSError as error:
        # pyroute2 replaces the reason with "failed to open netns", and the file name with
        # the number of the descriptor.
        number = error.errno or errno.EPERM
        raise OSError(number, os.strerror(number)) from error
