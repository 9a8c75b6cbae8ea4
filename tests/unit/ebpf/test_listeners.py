# SPDX-License-Identifier: GPL-3.0-only
"""The listeners are read again after a change, and at the latest after a minute."""

import numpy as np
import pytest

from tcpexporter.connections.record import LISTENER, Records
from tcpexporter.ebpf.listeners import REFRESH_S, SETTLED_S, Listeners
from tcpexporter.errors import SocketTableError


class Host:
    """A host whose listeners a test changes, and its clock."""

    def __init__(self) -> None:
        self.now_s = 1009.0
        self.changes = 0
        self.ports: tuple[int, ...] = (80,)
        self.dumps = 0
        self.error: SocketTableError | None = None
        self.listeners = Listeners(
            self._dump, lambda: self.changes, clock_s=lambda: self.now_s
        )

    def _dump(self) -> Records:
        if self.error:
            raise self.error
        self.dumps += 1
        return np.array([(1, port, 4, 0) for port in self.ports], LISTENER)

    def read_after(self, seconds: float) -> tuple[int, ...]:
        self.now_s += seconds
        return tuple(self.listeners.read()["port"].tolist())


@pytest.fixture
def host() -> Host:
    """A host whose listeners have not changed for some time."""
    made = Host()
    assert made.read_after(0) == made.read_after(SETTLED_S) == (80,)
    assert made.dumps == 2
    return made


def test_without_a_change_the_same_array_is_returned(host: Host) -> None:
    """There is no dump until the last one is too old."""
    first = host.listeners.read()
    assert host.read_after(REFRESH_S - 1) == (80,)
    assert host.listeners.read() is first
    assert host.dumps == 2
    host.ports = (80, 443)  # c
    assert host.read_after(1) == (80, 443)
    assert host.dumps == 3


def test_a_change_is_shown_by_the_next_scrape(host: Host) -> None:
    """A listener appears and another one disappears."""
    host.ports, host.changes = (80, 443), 1
    assert host.read_after(7) == (80, 443)
    host.ports, host.changes = (443,), 2
    assert host.read_after(0) == (443,)


def test_a_listener_that_a_dump_shows_later_is_not_missed(host: Host) -> None:
    """The kernel reports it first: scrapes dump until the change has settled."""
    host.changes = 1
    assert host.read_after(5) == (80,)
    host.ports = (80, 443)
    assert host.read_after(SETTLED_S / 2) == (80, 443)
    assert host.read_after(SETTLED_S / 2) == (80, 443)
    assert host.dumps == 5
    assert host.read_after(SETTLED_S) == (80, 443)
    assert host.dumps == 5


def test_after_a_failed_dump_the_next_scrape_dumps(host: Host) -> None:
    """The error is raised, and the change is not forgotten."""
    host.changes, host.error = 1, SocketTableError("no")
    with pytest.raises(SocketTableError):
        host.read_after(0)
    host.error, host.ports = None, (80, 443)
    assert host.read_after(0) == (80, 443)
