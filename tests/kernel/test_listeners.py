# SPDX-License-Identifier: GPL-3.0-only
"""The BPF program counts listeners, so that a scrape does not have to read them."""

import contextlib
import time

import pytest

from tcpexporter.connections.record import Records
from tcpexporter.ebpf.listeners import SETTLED_S, Listeners
from tcpexporter.socket_tables.tables import open_tables
from tests.kernel.helpers.in_process import attach
from tests.support import Peers, reset

ADDRESSES = ("127.0.0.1", "::1", "::", "127.0.0.7", "127.0.0.1", "::1", "127.0.0.1")


def test_only_listeners_are_counted_and_not_the_sockets_they_accept() -> None:
    """Seven appear, accept connections that end in any way, and disappear.

    The kernel may skip the program for some of them, and counts that.
    """
    with contextlib.closing(attach()) as tracker:

        def is_counted(number: int) -> bool:
            changes = tracker.listener_changes()
            assert tracker.events().listener_changes == changes
            return number - tracker.missed_events() <= changes <= number

        assert is_counted(0)
        with contextlib.ExitStack() as opened:
            every = [opened.enter_context(Peers(each)) for each in ADDRESSES]
            assert is_counted(7)
            for peers in every:
                peers.connect(11)
                reset(peers.pairs[0][0])
                peers.pairs[1][1].close()
            assert is_counted(7)
        assert is_counted(14)


@pytest.mark.any_kernel
def test_listeners_are_dumped_only_after_a_change() -> None:
    """Connections cause no dump. A new listener is shown at once, and so is its end."""
    dumps = 0
    tracker, tables = attach(), open_tables("sock_diag", "self")

    def dump() -> Records:
        nonlocal dumps
        dumps += 1
        return tables.listeners()

    listeners = Listeners(dump, tracker.listener_changes)

    def ports() -> set[int]:
        return {*listeners.read()["port"].tolist()}

    with contextlib.closing(tracker), contextlib.closing(tables), Peers() as peers:
        assert ports() == {peers.port}
        time.sleep(SETTLED_S)
        assert ports() == {peers.port}
        before = dumps
        for number in range(13):
            peers.connect(number)
            assert ports() == {peers.port}
        assert dumps == before
        with Peers("::1") as other:
            assert ports() == {peers.port, other.port}
            other.connect(3)
            assert ports() == {peers.port, other.port}
        assert ports() == {peers.port}


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", ["sock_diag", "procfs"])
def test_listeners_that_appear_or_disappear_are_shown(name: str) -> None:
    """This is so although an unchanged reply of sock_diag is not decoded again."""
    with contextlib.closing(open_tables(name, "self")) as tables:

        def ports() -> set[int]:
            return {*tables.listeners()["port"].tolist()}

        for _ in range(3):
            with Peers("::1") as one, Peers() as other:
                assert ports() == ports() == {one.port, other.port}
                one.connect(2)
                assert ports() == {one.port, other.port}
                other.listener.close()
                assert ports() == {one.port}
            assert ports() == ports() == set()
