# SPDX-License-Identifier: GPL-3.0-only
"""Opens and closes loopback connections, one after another."""

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator, Sequence

from tests.benchmarks.hold import address
from tests.support import reset

PORT = 19_999
ADDRESSES = range(60_000, 60_031)
"""Numbers of the loopback addresses (`hold.address`) for this module; held connections
use others. One address does not suffice, because half of the connections closed by FIN
leave an ephemeral port in TIME_WAIT for a minute."""

Ending = Callable[[socket.socket, socket.socket], None]


def by_fin(first: socket.socket, second: socket.socket) -> None:
    """Close the first end with FIN, then the second."""
    first.close()
    second.close()


def by_rst(first: socket.socket, second: socket.socket) -> None:
    """Reset the connection from the first end, then close the second."""
    reset(first)
    second.close()


@contextlib.contextmanager
def listening() -> Iterator[Sequence[socket.socket]]:
    """Open the listeners that `churn` requires, in this network namespace."""
    with contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(socket.create_server((address(number), PORT)))
            for number in ADDRESSES
        ]


def churn(listeners: Sequence[socket.socket], connections: int, ending: Ending) -> None:
    """Connect, accept and close; client and server take turns to close first."""
    targets = [(listener, listener.getsockname()) for listener in listeners]
    for number, (listener, target) in enumerate(
        itertools.islice(itertools.cycle(targets), connections)
    ):
        client = socket.socket()
        client.connect(target)
        server, _ = listener.accept()
        if number % 2:
            ending(client, server)
        else:
            ending(server, client)
