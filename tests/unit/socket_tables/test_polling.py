# SPDX-License-Identifier: GPL-3.0-only
"""The polling source, with socket tables that a test defines."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.counting import Projection, count
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import (
    TIME_SHIFT,
    Direction,
    OutboundPort,
    Parts,
    kernel_parts,
)
from tcpexporter.connections.record import (
    LISTENER,
    SOCKET,
    Records,
    Words,
    numbers,
    times_ns,
)
from tcpexporter.connections.selection import select
from tcpexporter.connections.series import SERIES
from tcpexporter.connections.slot_counts import SlotCounts
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
    """Return ``established_ns`` of each connection, by remote port."""
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
        return np.array([(1, 443, 4, 0)], LISTENER)

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
    """Return the number of the dump that first found each connection, by remote port."""
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
    assert source.listeners().tolist() == [(1, 443, 4, 0)]
    assert source.report() == Report()


class RecordTables(FakeTables):
    """Tables in which a dump finds ``found``."""

    found: Records = connections()

    def established(self, *, with_ages: bool = True) -> Records:  # noqa: ARG002
        return self.found.copy()


def polled(
    *, bounds_s: Sequence[float] = (), parts: Parts = BY_REMOTE_PORT
) -> tuple[RecordTables, PollingSource]:
    """Return a source whose thread never polls: a test calls `_poll`."""
    tables = RecordTables()
    return tables, PollingSource(
        tables, interval_s=3600, parts=parts, lifetime_bounds_s=bounds_s
    )


def counters(source: PollingSource) -> dict[int, tuple[int, int, int]]:
    """Return opened, closed and pre-existing connections by port."""
    ledger = source.ledger()
    rows = zip(
        ledger.series.view(SERIES)["port"].tolist(),
        ledger.opened.tolist(),
        ledger.closed.tolist(),
        ledger.pre_existing.tolist(),
        strict=True,
    )
    return {port: (opened, closed, before) for port, opened, closed, before in rows if port}


def to_ports(*ports: int, seen_ns: int = 0) -> Records:
    return connections(*ports, seen_ns=seen_ns, direction=Direction.OUTBOUND)


def test_a_connection_that_a_dump_repeats_is_counted_once() -> None:
    """The first poll may repeat it, or a later one; nothing opens or closes."""
    tables, source = polled()
    tables.found = to_ports(80, 443, 80)
    source.start()
    assert counters(source) == {80: (0, 0, 1), 443: (0, 0, 1)}
    for ports in ((80, 443, 443, 443), (80, 443), (443, 80, 443)):
        tables.found = to_ports(*ports)
        source._poll()
        assert np.count_nonzero(read(source)) == 2
        assert counters(source) == {80: (0, 0, 1), 443: (0, 0, 1)}


def test_what_opens_and_closes_between_polls_is_counted() -> None:
    """Connections of the first poll are pre-existing."""
    tables, source = polled()
    tables.found = to_ports(1, 2)
    source.start()
    assert counters(source) == {1: (0, 0, 1), 2: (0, 0, 1)}
    tables.found = to_ports(2, 3)
    source._poll()
    assert counters(source) == {1: (0, 1, 1), 2: (0, 0, 1), 3: (1, 0, 0)}
    tables.found = to_ports()
    source._poll()
    assert counters(source) == {1: (0, 1, 1), 2: (0, 1, 1), 3: (1, 1, 0)}
    tables.found = to_ports(1)
    source._poll()
    assert counters(source)[1] == (1, 1, 1)
    source.close()


@given(
    st.lists(st.sets(st.integers(1, 7)), min_size=1, max_size=7),
    st.integers(0, 3),
)
def test_opened_less_closed_is_open_less_pre_existing(
    polls: list[set[int]], before: int
) -> None:
    """This holds after each poll, in each series."""
    tables, source = polled()
    tables.found = to_ports(*range(1, before + 1))
    source.start()
    for ports in polls:
        tables.found = to_ports(*sorted(ports))
        source._poll()
        found = set(ages_of(source))
        assert found == ports
        for port, (opened, closed, pre_existing) in counters(source).items():
            assert opened - closed == (port in found) - pre_existing
    source.close()


def test_a_connection_that_opens_and_closes_between_polls_is_not_seen() -> None:
    """This limit is documented: the tables show it at no poll."""
    tables, source = polled()
    source.start()
    tables.found = to_ports(1)
    tables.found = to_ports()
    source._poll()
    assert counters(source) == {}
    source.close()


def test_a_connection_that_reopens_between_polls_seems_to_stay_open() -> None:
    """This limit is documented: both connections have the same addresses and ports."""
    tables, source = polled()
    tables.found = to_ports(1, seen_ns=3 << TIME_SHIFT)
    source.start()
    tables.found = to_ports(1, seen_ns=5 << TIME_SHIFT)
    source._poll()
    assert counters(source) == {1: (0, 0, 1)}
    assert ages_of(source) == {1: 3}
    source.close()


def test_a_lifetime_ends_at_the_poll_that_does_not_find_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is at most one interval too long."""
    monkeypatch.setattr(
        "tcpexporter.socket_tables.polling.boottime_ns", lambda: 100 * 10**9
    )
    tables, source = polled(bounds_s=(1.0, 6.0))
    tables.found = np.concatenate(
        [
            to_ports(port, seen_ns=100 * 10**9 - round(lifetime_s * 1e9))
            for port, lifetime_s in ((1, 0.5), (2, 5.5), (3, 7.5))
        ]
    )
    source.start()
    tables.found = to_ports()
    source._poll()
    ledger = source.ledger()
    by_port = dict(
        zip(ledger.series.view(SERIES)["port"], ledger.lifetimes.tolist(), strict=True)
    )
    assert [by_port[port] for port in (1, 2, 3)] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    total_s = ledger.lifetimes_sum.sum() * (1 << TIME_SHIFT) / 1e9
    assert total_s == pytest.approx(0.5 + 5.5 + 7.5, abs=1e-4)
    source.close()


def in_netns(netns: int, *ports: int) -> Records:
    made = to_ports(*ports)
    made["key"]["netns"] = netns
    return made


def test_a_namespace_that_is_forgotten_loses_its_counters_at_the_next_poll() -> None:
    """Its last connections may close in the same poll."""
    tables, source = polled(parts=Parts(OutboundPort.REMOTE, by_netns=True))
    tables.found = np.concatenate([in_netns(7, 1, 2), in_netns(11, 3)])
    source.start()
    tables.found = in_netns(11, 3)
    source.forget("netns", [7])
    source._poll()
    assert counters(source) == {3: (0, 0, 1)}
    assert ages_of(source) == {3: 0}
    tables.found = np.concatenate([in_netns(7, 1), in_netns(11, 3)])
    source._poll()
    assert counters(source) == {3: (0, 0, 1), 1: (1, 0, 0)}
    source.close()


def fail_after(
    patch: pytest.MonkeyPatch, step: Callable[..., object], failures: int
) -> None:
    """Make a method of the ledger raise MemoryError this many times, at its end."""

    def failing_step(*arguments: object) -> object:
        nonlocal failures
        result = step(*arguments)
        if failures:
            failures -= 1
            raise MemoryError
        return result

    patch.setattr(MemoryLedger, step.__name__, failing_step)


@pytest.mark.parametrize(
    "step",
    [
        MemoryLedger.record_closed,
        MemoryLedger.drop_forgotten,
        MemoryLedger.count,
        MemoryLedger.record_opened,
        MemoryLedger.snapshot,
    ],
)
def test_a_failed_poll_changes_no_counter(
    step: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three failures the next poll counts two closings and three openings once.

    It also forgets the namespace that each of them should have forgotten.
    """
    parts = Parts(OutboundPort.REMOTE, by_netns=True)
    tables, source = polled(bounds_s=(1.0,), parts=parts)
    tables.found = np.concatenate([in_netns(7, 1), in_netns(11, 2, 3, 5)])
    source.start()
    tables.found = in_netns(11, 5, 7, 13, 17)
    source.forget("netns", [7])
    before = counters(source), ages_of(source)
    fail_after(monkeypatch, step, failures=3)
    for _ in range(3):
        with pytest.raises(MemoryError):
            source._poll()
        assert (counters(source), ages_of(source)) == before
    source._poll()
    assert ages_of(source).keys() == {5, 7, 13, 17}
    assert counters(source) == {
        2: (0, 1, 1),
        3: (0, 1, 1),
        5: (0, 0, 1),
        **dict.fromkeys((7, 13, 17), (1, 0, 0)),
    }
    assert source.ledger().lifetimes.sum() == 2
    source.close()


def test_a_scrape_during_a_poll_counts_no_connection_in_another_series() -> None:
    """It reads the words before the poll, and the ledger afterwards.

    The poll gives the number of a forgotten series to another one.
    """
    labels = ("remote_port", "netns")
    selection = select((), tcpv6=True, directions=[Direction.OUTBOUND], labels=labels)
    tables, source = polled(parts=kernel_parts(selection.directions, labels))
    tables.found = np.concatenate([in_netns(7, 1), in_netns(11, 3)])
    source.start()

    def poll() -> Iterator[Chunk]:
        yield from source.read()
        tables.found = in_netns(11, 3, 5)
        source.forget("netns", [7])
        source._poll()

    counts = count(poll(), source.ledger, SlotCounts(), Projection(selection), [0])
    ports = counts.series.view(SERIES)["port"].tolist()
    assert dict(zip(ports, counts.values.established, strict=True)) == {3: 1, 5: 0}
    source.close()
