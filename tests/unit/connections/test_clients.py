# SPDX-License-Identifier: GPL-3.0-only
"""Distinct clients of any labels, compared with sets and counters of a Python loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.clients import Chunk, ClientTable, SeenClients
from tcpexporter.connections.counting import Counts, Projection, count
from tcpexporter.connections.folding import Folder
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import NO_LISTENER, SERIES_FIRST, Direction, client_masks
from tcpexporter.connections.record import CLOSED, Records, words
from tcpexporter.connections.selection import Selection, named
from tcpexporter.connections.slot_counts import SlotCounts
from tcpexporter.metrics.series_labels import Labels
from tests.unit.connections.test_counting import (
    BOTH,
    FREE,
    INBOUND,
    LATEST_NS,
    OTHER_NETNS,
    OWN_NETNS,
    TIMES_NS,
    UNIT_NS,
    Connection,
    any_connection,
    is_old,
    is_selected,
    labels_of,
    ledger_of,
    parts_of,
    records,
    selection,
    some_labels,
    values_of,
)
from tests.unit.series_rows import series_of_rows

ADDRESSES = {
    4: ("192.0.2.1", "192.0.2.2", "192.0.3.1", "198.51.100.1", "0.0.0.0"),
    6: ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db9::1", "::"),
}
"""Addresses of clients, by IP version; some differ in their last bits only."""

DEFAULT = (32, 64)
"""The default of --client-prefix."""


class Seen(NamedTuple):
    """A connection of a client."""

    connection: Connection
    address: str

    def client(self, prefix: tuple[int, int]) -> str:
        bits = prefix[0] if self.connection.version == 4 else prefix[1]
        return str(ip_network((self.address, bits), strict=False))


def of_any_client(connection: Connection) -> st.SearchStrategy[Seen]:
    return st.builds(
        Seen, st.just(connection), st.sampled_from(ADDRESSES[connection.version])
    )


some_seen = st.lists(any_connection.flatmap(of_any_client), max_size=31)


class Clients(NamedTuple):
    """The clients of one series: those with a connection, those with a long-term one, and
    the connections of the client that has most."""

    established: int
    long_term: int
    largest: int


def records_of(everything: Sequence[Seen]) -> Records:
    made = records([each.connection for each in everything])
    for record, each in zip(made, everything, strict=True):
        address = ip_address(each.address)
        mapped = b"" if address.version == 6 else bytes(10) + b"\xff\xff"
        packed = np.frombuffer(mapped + address.packed, np.uint8)
        record["key"]["remote_address"] = packed
    return made


def counted(
    everything: Sequence[Seen],
    selected: Selection,
    since_ns: int = 0,
    *,
    prefix: tuple[int, int] = DEFAULT,
    cuts: Sequence[int] = (),
) -> Counts:
    """Count connections and clients, cut into chunks."""
    ledger = MemoryLedger(replace(parts_of(selected), client_masks=client_masks(*prefix)))
    chunks = [ledger.count(each) for each in np.split(records_of(everything), cuts)]
    projection = Projection(selected)
    return count(
        chunks, ledger.snapshot, SlotCounts(), projection, [since_ns], long_term_ns=since_ns
    )


def clients_by_labels(counts: Counts, selected: Selection) -> dict[Labels, Clients]:
    """Return the clients of each series that has any."""
    found = counts.clients()
    assert found is not None
    columns = (found.established, found.long_term, found.largest)
    rows = zip(*(each.tolist() for each in columns), strict=True)
    names = values_of(counts, selected)
    return {
        name: Clients(*row) for name, row in zip(names, rows, strict=True) if row[0] > 0
    }


def expected_of(
    everything: Sequence[tuple[Labels, Seen]], since_ns: int, prefix: tuple[int, int]
) -> dict[Labels, Clients]:
    """Count the clients of the labels that each connection has."""
    names = {labels for labels, _ in everything}
    found = {}
    for name in names:
        here = [each for labels, each in everything if labels == name]
        connections = Counter(each.client(prefix) for each in here)
        old = {each.client(prefix) for each in here if is_old(each.connection, since_ns)}
        found[name] = Clients(len(connections), len(old), max(connections.values()))
    return found


@given(
    everything=some_seen,
    cuts=st.lists(st.integers(0, 31), max_size=3),
    ports=st.sets(st.sampled_from([80, 443, 9690])),
    tcpv6=st.booleans(),
    directions=st.sampled_from([INBOUND, (Direction.OUTBOUND,), BOTH]),
    own_listener=st.sampled_from([NO_LISTENER, (OWN_NETNS, 9690), (OTHER_NETNS, 80)]),
    labels=some_labels,
    since_ns=st.sampled_from([-1, *TIMES_NS, LATEST_NS - UNIT_NS]),
    prefix=st.sampled_from([DEFAULT, (24, 56), (1, 1), (32, 128), (16, 32)]),
)
def test_clients_are_those_of_a_python_loop(
    *,
    everything: list[Seen],
    cuts: list[int],
    ports: set[int],
    tcpv6: bool,
    directions: tuple[Direction, ...],
    own_listener: tuple[int, int],
    labels: tuple[str, ...],
    since_ns: int,
    prefix: tuple[int, int],
) -> None:
    """This holds for any connections, chunks, labels, selections and prefixes.

    In each series, clients with a long-term connection are clients, and each client has a
    connection. A client of several series is one client of their sum.
    """
    selected = selection(
        *ports,
        tcpv6=tcpv6,
        directions=directions,
        own_listener=own_listener,
        labels=labels,
    )
    chosen = [each for each in everything if is_selected(each.connection, selected)]
    by_label = [(labels_of(each.connection, labels), each) for each in chosen]
    counts = counted(everything, selected, since_ns, prefix=prefix, cuts=sorted(cuts))
    found = clients_by_labels(counts, selected)
    assert found == expected_of(by_label, since_ns, prefix)

    clients = counts.clients()
    assert clients is not None
    assert (clients.long_term <= clients.established).all()
    assert (clients.established <= counts.values.established).all()
    assert (clients.largest <= counts.values.established).all()
    # This holds only if the same port is selected with and without labels.
    if not ports:
        whole = replace(selected, labels=())
        (total,) = clients_by_labels(
            counted(everything, whole, since_ns, prefix=prefix), whole
        ).values() or [Clients(0, 0, 0)]
        assert total.established <= clients.established.sum()
        assert total.long_term <= clients.long_term.sum()
        assert total.largest >= clients.largest.max(initial=0)


@given(everything=some_seen, max_series=st.integers(1, 5))
def test_a_client_of_several_folded_series_is_one_client(
    everything: list[Seen], max_series: int
) -> None:
    """In the folded series, the clients of the series that it contains are united."""
    labels = ("port", "tcp_version")
    selected = selection(labels=labels)
    since_ns = 100 * UNIT_NS
    none = named((), OWN_NETNS, selected)
    exposed, _ = Folder().fold(
        counted(everything, selected, since_ns),
        listening=none,
        named=none,
        published=none,
        max_series=max_series,
        selection=selected,
    )
    rows = {*values_of(exposed, selected)}
    placed = []
    for each in everything:
        if is_selected(each.connection, selected):
            own = labels_of(each.connection, labels)
            placed.append((own if own in rows else ("other", own[1]), each))
    found = clients_by_labels(exposed, selected)
    assert found == expected_of(placed, since_ns, DEFAULT)


def test_series_that_are_left_out_keep_no_clients() -> None:
    """`Counts.only` leaves out the clients of other series too."""
    here = Seen(Connection(443), "192.0.2.1")
    there = Seen(Connection(80), "192.0.2.1")
    counts = counted([here, there, there], selection())
    chosen = np.flatnonzero(counts.values.established == 2)
    shown = clients_by_labels(counts.only(chosen), selection())
    assert shown == {("80", "4"): Clients(1, 1, 2)}


def test_without_connections_there_are_no_clients() -> None:
    """A series that only has a listener has 0 clients; without series there are none."""
    counts = counted([], selection())
    assert clients_by_labels(counts, selection()) == {}
    empty = counts.moved(series_of_rows([(4, 0, 443)]), np.empty(0, np.intp))
    clients = empty.clients()
    assert clients is not None
    assert [clients.established, clients.long_term, clients.largest] == [[0], [0], [0]]


def test_clients_are_counted_on_request_only() -> None:
    """Without ``long_term_ns`` the result is None, not 0."""
    ledger = MemoryLedger(parts_of(selection()))
    chunk = ledger.count(records_of([Seen(Connection(), "192.0.2.1")]))
    assert chunk.clients is None
    counts = count([chunk], ledger.snapshot, SlotCounts(), Projection(selection()), [0])
    assert counts.clients() is None


def test_the_clients_of_a_slot_without_connection_are_not_counted() -> None:
    """The hash of the client stays in the slot when a connection closes."""
    open_now = words(np.array([SERIES_FIRST], np.uint32), np.zeros(1, np.uint64))
    chunk = Chunk(
        np.array([CLOSED, 0, open_now[0]], np.uint64), np.array([7, 0, 11], np.uint64)
    )
    counts = count(
        [chunk],
        lambda: ledger_of([(4, 0, 443, 0), FREE]),
        SlotCounts(),
        Projection(selection()),
        [0],
        long_term_ns=0,
    )
    shown = clients_by_labels(counts, selection())
    assert shown == {("443", "4"): Clients(1, 1, 1)}


@pytest.mark.parametrize("bits", [0, 31])
def test_clients_that_differ_in_one_bit_of_the_hash_are_two(bits: int) -> None:
    """Clients with equal hashes in two series are two as well."""
    hashes = np.array([1 << bits, 0, 1 << bits], np.uint64)
    numbers = np.array([5, 5, 6], np.uint64)
    rows = np.array([-1, -1, -1, -1, -1, 0, 1])
    keys = (numbers << np.uint64(32)) | hashes
    table = ClientTable()
    table.change(keys, 1)
    table.merge([keys])
    found = SeenClients(table, []).counts(rows, 2)
    assert found.established.tolist() == [2, 1]


def test_a_number_that_is_new_has_no_clients() -> None:
    """A series gets a number after the clients were added up; it has no connection yet."""
    table = ClientTable()
    table.change(np.array([3 << 32], np.uint64), 1)
    table.merge([np.array([3 << 32], np.uint64)])
    for rows, clients in (([-1, -1, -1, 0], [1]), ([-1, -1, -1, 0, 1], [1, 0])):
        found = SeenClients(table, []).counts(np.array(rows), len(clients))
        assert found.established.tolist() == clients
