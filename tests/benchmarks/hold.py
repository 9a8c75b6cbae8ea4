# SPDX-License-Identifier: GPL-3.0-only
"""Holds real loopback connections, in processes of their own that share the descriptors."""

import contextlib
import itertools
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.figures import PORTS
from tests.benchmarks.machine import ROOT

PER_PROCESS = 5_000
"""Connections that one process holds at most; each takes a descriptor for either end."""

OTHER_DESCRIPTORS = 100
DEADLINE_S = 60.0


@contextlib.contextmanager
def held(connections: int) -> Iterator[None]:
    """Hold that many in this network namespace, spread evenly over the ports.

    Every process has an address of its own, so the ephemeral ports do not run out. It
    ends when its standard input does, so it never outlives who started it.
    """
    with contextlib.ExitStack() as started:
        holders = [
            started.enter_context(_holder(address(number), share))
            for number, share in enumerate(_shares(connections))
        ]
        for process in holders:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("the connections to hold cannot be made")
        yield


def address(number: int) -> str:
    """One of the loopback addresses 127.x.y.1."""
    return f"127.{1 + number // 256}.{number % 256}.1"


@contextlib.contextmanager
def _holder(at: str, connections: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.hold", at, str(connections)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEADLINE_S)
            process.kill()


def _shares(connections: int) -> list[int]:
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(PER_PROCESS, (descriptors - OTHER_DESCRIPTORS) // 2)
    whole, rest = divmod(connections, most)
    return [most] * whole + [rest] * bool(rest)


def _hold(at: str, connections: int) -> None:
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    listeners = [socket.create_server((at, port)) for port in PORTS]
    ends = []
    for listener in itertools.islice(itertools.cycle(listeners), connections):
        ends.append(socket.create_connection(listener.getsockname()))
        ends.append(listener.accept()[0])
    sys.stdout.write("held\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _hold(sys.argv[1], int(sys.argv[2]))
