# SPDX-License-Identifier: GPL-3.0-only
"""The polling source, with socket tables made by a test."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tcpexporter.connections.record import (
    LISTENER,
    SOCKET,
    TIME_SHIFT,
    Direction,
    Records,
    Words,
    numbers,
    times_ns,
)
from tcpexporter.connections.series import SERIES, OutboundPort, Parts
from tcpexporter.connections.source import Report
from tcpexporter.errors import SocketTableError, SourceError
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.tables import SocketTables

BY_REMOTE_PORT = Parts(OutboundPort.REMOTE, by_netns=False)

PATIENCE_S = 10
"""Time after which a test fails if the next poll does not have the expected effect."""


def connections(
    *ports: int, seen_ns: int = 0, direction: Direction = Direction.INBOUND
) -> Records:
    made = np.zeros(len(ports), SOCKET)
    made["key"]["remote_port"] = ports
    made["established_ns"] = seen_ns
    made["key"]["local_port"] = 443
    made["is_outbound"] = direction
    return made


def ages(found: Records) -> dict[int, int]:
    """Times when connections were first found, by remote port."""
    assert len(np.unique(found["key"])) == len(found)
    return dict(
        zip(
            found["key"]["remote_port"].tolist(),
            found["established_ns"].tolist(),
            strict=True,
        )
    )


class FakeTables(SocketTables):
    """Tables in which a dump finds outbound connections to ``ports``, or fails.

    The time of a connection is the number of the dump, in units of 2^13 ns.
    """

    def __init__(self, *ports: int) -> None:
        self.name = "fake"
        self.ports = ports
        self.error: SocketTableError | None = None
        self.dumps = 0
        self.readers: set[threading.Thread] = set()
        self.closed = False
        self.closed_while_polled = False

    def established(self, *, with_ages: bool = True) -> Records:  # noqa: ARG002
        assert not self.closed
        self.dumps += 1
        self.readers.add(threading.current_thread())
        if self.error:
            raise self.error
        return connections(
            *self.ports,
            seen_ns=self.dumps << TIME_SHIFT,
            direction=Direction.OUTBOUND,
        )

    def listeners(self) -> Records:
        return np.array([(1, 443, 4)], LISTENER)

    def close(self) -> None:
        self.closed = True
        others = self.readers - {threading.current_thread()}
        self.closed_while_polled |= any(each.is_alive() for each in others)


@pytest.fixture
def tables() -> FakeTables:
    return FakeTables(1, 2, 3)


@pytest.fixture
def source(tables: FakeTables) -> Iterator[PollingSource]:
    made = PollingSource(tables, interval_s=0.001, parts=BY_REMOTE_PORT)
    yield made
    made.close()


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.001)


def after_polls(tables: FakeTables, number: int) -> None:
    """Wait until this number of further dumps has ended."""
    enough = tables.dumps + number + 1
    eventually(lambda: tables.dumps >= enough)


def read(source: PollingSource) -> Words:
    (only,) = source.read()
    return only.words


def ages_of(source: PollingSource) -> dict[int, int]:
    """Number of the dump that first found each connection, by remote port."""
    found = read(source)
    ports = source.ledger().series.view(SERIES)["port"][numbers(found)].tolist()
    times = (times_ns(found) >> np.uint64(TIME_SHIFT)).tolist()
    assert len(set(ports)) == len(ports)
    return dict(zip(ports, times, strict=True))


def test_new_connections_are_added_and_closed_ones_removed(
    tables: FakeTables, source: PollingSource
) -> None:
    """Reading returns the connections of the last poll. Each has the time of the first
    poll that found it."""
    source.start()
    assert ages_of(source) == dict.fromkeys((1, 2, 3), 1)
    after_polls(tables, 3)
    tables.ports = (2, 3, 5)
    eventually(lambda: 5 in ages_of(source))
    first_seen_at = ages_of(source)
    assert first_seen_at.keys() == {2, 3, 5}
    assert first_seen_at[2] == first_seen_at[3] == 1
    assert first_seen_at[5] > 3
    after_polls(tables, 3)
    assert ages_of(source) == first_seen_at


def test_a_connection_that_reappears_is_new(
    tables: FakeTables, source: PollingSource
) -> None:
    """A connection that one poll did not find has age 0 at the next one."""
    source.start()
    tables.ports = (1, 2)
    eventually(lambda: 3 not in ages_of(source))
    tables.ports = (1, 2, 3)
    eventually(lambda: 3 in ages_of(source))
    assert ages_of(source)[3] > ages_of(source)[1] == 1


def test_reading_does_not_poll(tables: FakeTables) -> None:
    """Only the thread reads the tables, once per interval."""
    source = PollingSource(tables, interval_s=3600, parts=BY_REMOTE_PORT)
    source.start()
    for _ in range(7):
        read(source)
    assert tables.dumps == 1
    source.close()


def test_a_failed_first_poll_is_an_error(tables: FakeTables, source: PollingSource) -> None:
    """`start` raises the error, and there is no thread."""
    tables.error = SocketTableError("no sock_diag")
    with pytest.raises(SocketTableError, match="no sock_diag"):
        source.start()
    source.close()
    assert tables.dumps == 1
    assert tables.closed


def failing(source: PollingSource) -> bool:
    try:
        read(source)
    except SourceError:
        return True
    return False


def test_a_failed_poll_is_an_error_until_one_succeeds(
    tables: FakeTables, source: PollingSource, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then reads fail, and one warning is logged. Afterwards the old times are
    restored."""
    source.start()
    tables.error = SocketTableError("no sock_diag")
    eventually(lambda: failing(source))
    after_polls(tables, 3)
    with pytest.raises(SourceError, match="no sock_diag"):
        read(source)
    tables.ports = (2, 3, 5)
    tables.error = None
    eventually(lambda: not failing(source))
    assert ages_of(source).keys() == {2, 3, 5}
    assert ages_of(source)[2] == 1
    assert ages_of(source)[5] > 4
    (warning,) = caplog.messages
    assert warning == "cannot count connections: no sock_diag"


def test_each_new_failure_is_logged(
    tables: FakeTables, source: PollingSource, caplog: pytest.LogCaptureFixture
) -> None:
    """There is another warning for the first failure after a success."""
    source.start()
    for _ in range(3):
        tables.error = SocketTableError("no sock_diag")
        eventually(lambda: failing(source))
        tables.error = None
        eventually(lambda: not failing(source))
    assert len(caplog.messages) == 3


def test_closing_ends_the_thread_before_the_tables(
    tables: FakeTables, source: PollingSource
) -> None:
    """No poll reads a closed descriptor, and the thread has ended."""
    source.start()
    after_polls(tables, 3)
    assert len(tables.readers) == 2
    source.close()
    assert tables.closed
    assert not tables.closed_while_polled


def test_closing_does_not_wait_for_the_interval(tables: FakeTables) -> None:
    """The interval is an hour."""
    source = PollingSource(tables, interval_s=3600, parts=BY_REMOTE_PORT)
    source.start()
    started_s = time.monotonic()
    source.close()
    assert time.monotonic() - started_s < PATIENCE_S


def test_name_and_listeners_come_from_the_tables(
    tables: FakeTables, source: PollingSource
) -> None:
    """The report has no values: there is no BPF program and no limit of connections."""
    assert source.name == tables.name
    assert source.listeners().tolist() == [(1, 443, 4)]
    assert source.report() == Report()
