# SPDX-License-Identifier: GPL-3.0-only
"""Holds real loopback connections in child processes, which own the descriptors."""

import contextlib
import itertools
import os
import random
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests.benchmarks import ROOT

PORTS = range(20_000, 20_050)
"""Ports of the listeners. They are below the ephemeral ports, so that no client gets
one."""

PER_PROCESS = 27_000
"""Maximum number of connections of a process; each requires two descriptors."""

IP_BIND_ADDRESS_NO_PORT = 24
"""ip(7); Python has it since 3.12."""

OTHER_DESCRIPTORS = 100
DEADLINE_S = 60.0

# Closing sends RST: otherwise too many sockets would stay in FIN_WAIT or TIME_WAIT.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def held(connections: int) -> Iterator[None]:
    """Hold this many connections in this network namespace, spread evenly over the ports.

    Each child process connects to its own address, so the ephemeral ports suffice. All
    accept from the same listeners: one for each port, for any number of connections. A
    child ends when its standard input is closed, so it ends with its parent.

    Raises:
        RuntimeError: the connections cannot be opened; the reason is on standard error.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        with contextlib.ExitStack() as opened:
            listeners = [opened.enter_context(_listener(port)) for port in PORTS]
            for number, share in enumerate(_shares(connections)):
                holders.append(_holder(address(number), share, listeners))
        for holder in holders:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise RuntimeError("cannot open the connections to hold")
        yield
    finally:
        _end(holders)


def address(number: int) -> str:
    """Return the loopback address 127.x.y.1 with this number."""
    return f"127.{1 + number // 256}.{number % 256}.1"


def _holder(
    at: str, connections: int, listeners: Sequence[socket.socket]
) -> subprocess.Popen[bytes]:
    descriptors = [each.fileno() for each in listeners]
    arguments = map(str, (connections, *descriptors))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.hold", at, *arguments],
        cwd=ROOT,
        pass_fds=descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _end(holders: list[subprocess.Popen[bytes]]) -> None:
    # All at once, because the kernel needs some time to close the sockets of each.
    for holder in holders:
        assert holder.stdin is not None
        holder.stdin.close()
    for holder in holders:
        with contextlib.suppress(subprocess.TimeoutExpired):
            holder.wait(DEADLINE_S)
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def _shares(connections: int) -> list[int]:
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(PER_PROCESS, (descriptors - OTHER_DESCRIPTORS) // 2)
    whole, rest = divmod(connections, most)
    return [most] * whole + [rest] * bool(rest)


def _hold(at: str, connections: int, *inherited: int) -> None:
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    listeners = [socket.socket(fileno=each) for each in inherited]
    clients = random.Random(at)  # noqa: S311  # repeatable
    for listener in itertools.islice(itertools.cycle(listeners), connections):
        client = socket.socket()
        _reset_on_close(client)
        client.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        client.bind((_client_address(clients.getrandbits(20)), 0))
        _, port = listener.getsockname()
        client.connect((at, port))
        # It may be a connection of another child, which then accepts this one.
        server, _ = listener.accept()
        # Keep the descriptors only: a hundred thousand socket objects use much memory.
        client.detach()
        server.detach()
    sys.stdout.write("held\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


def _client_address(number: int) -> str:
    """Return one of a million addresses, so that many connections have a client of their
    own."""
    return f"127.{128 + (number >> 16)}.{number >> 8 & 255}.{number & 255 or 1}"


def _listener(port: int) -> socket.socket:
    listener = socket.create_server(("", port))
    _reset_on_close(listener)  # accepted sockets inherit this option
    return listener


def _reset_on_close(each: socket.socket) -> None:
    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


if __name__ == "__main__":
    _hold(sys.argv[1], *map(int, sys.argv[2:]))
