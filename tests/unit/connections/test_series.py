# SPDX-License-Identifier: GPL-3.0-only
"""The series of connections, compared with a Python loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections import series as series_module
from tcpexporter.connections.parts import (
    NO_LISTENER,
    SERIES_FIRST,
    Direction,
    OutboundPort,
    Parts,
)
from tcpexporter.connections.record import CONNECTION
from tcpexporter.connections.series import (
    COUNTERS,
    FOLDED,
    NO_SERIES,
    OUTBOUND,
    OWN,
    REMOTE_PORT,
    correction_dtype,
    entry_dtype,
    folded_number,
    folded_series,
    grouped,
    series_of,
)
from tests.unit.connections.test_counting import (
    BOTH,
    OTHER_NETNS,
    OWN_NETNS,
    Connection,
    records,
    some_connections,
)
from tests.unit.series_rows import rows_of, series_of_rows

Row = tuple[int, int, int, int]


def expected(connection: Connection, parts: Parts) -> Row:
    """Return the series as its comment in bpf/tcp_tracker.h describes it."""
    flags, port = 0, connection.port
    if connection.direction == Direction.OUTBOUND:
        flags = OUTBOUND
        if parts.outbound_port == OutboundPort.REMOTE:
            flags, port = OUTBOUND | REMOTE_PORT, connection.remote_port
        elif parts.outbound_port == OutboundPort.NONE:
            port = 0
    elif (connection.netns, connection.port) == parts.own_listener:
        flags = OWN
    return connection.version, flags, port, connection.netns if parts.by_netns else 0


@given(
    connections=some_connections,
    outbound_port=st.sampled_from([*OutboundPort]),
    by_netns=st.booleans(),
    own_listener=st.sampled_from([NO_LISTENER, (OWN_NETNS, 9690), (OTHER_NETNS, 443)]),
)
def test_series_are_those_of_a_python_loop(
    *,
    connections: list[Connection],
    outbound_port: OutboundPort,
    by_netns: bool,
    own_listener: tuple[int, int],
) -> None:
    """This holds for every part that may be counted separately."""
    parts = Parts(outbound_port, by_netns, own_listener)
    found = series_of(records(connections), parts)
    assert rows_of(found) == [expected(each, parts) for each in connections]
    assert (found != NO_SERIES).all()


@pytest.mark.parametrize("outbound_port", OutboundPort)
def test_slots_of_the_tracker_have_series_too(outbound_port: OutboundPort) -> None:
    """Any dtype with key and direction is accepted; a direction above 0 is outbound."""
    parts = Parts(outbound_port, by_netns=True)
    sockets = records([Connection(direction=each, remote_port=5432) for each in BOTH])
    slots = np.zeros(len(sockets), CONNECTION)
    slots["key"] = sockets["key"]
    slots["is_outbound"] = [0, 7]
    assert series_of(slots, parts).tolist() == series_of(sockets, parts).tolist()


def test_an_ephemeral_port_is_part_of_the_series_on_request_only() -> None:
    """Otherwise a client with a thousand connections to one server has one series."""
    made = records(
        [
            Connection(port, direction=Direction.OUTBOUND, remote_port=5432)
            for port in range(40000, 41009)
        ]
    )
    distinct = {
        each: len(np.unique(series_of(made, Parts(each, by_netns=False))))
        for each in OutboundPort
    }
    assert distinct == {
        OutboundPort.NONE: 1,
        OutboundPort.LOCAL: 1009,
        OutboundPort.REMOTE: 1,
    }


def test_series_without_cgroup_are_ordered_by_namespace_and_port() -> None:
    """An exposition has the order of the series as bytes, in which ``cgroup`` is first."""
    rows = [(6, 0, 22, 7), (4, OUTBOUND, 22, 7), (4, 0, 443, 7), (4, 0, 1, 11)]
    series = series_of_rows(rows)
    assert series.tolist() == sorted(series.tolist())


def test_a_folded_number_is_that_of_the_folded_series() -> None:
    """It has the IP version and the direction of the series that has no number."""
    rows = [
        (version, flags, port, netns)
        for version in (4, 6)
        for flags in (0, OUTBOUND, OUTBOUND | REMOTE_PORT)
        for port in (0, 443)
        for netns in (0, 7)
    ]
    series = series_of_rows(rows)
    found = folded_number(series)
    assert 1 <= found.min() <= found.max() < SERIES_FIRST
    assert rows_of(folded_series()[found]) == [
        (version, flags & OUTBOUND | FOLDED, 0, 0) for version, flags, _, _ in rows
    ]


@pytest.mark.parametrize(("buckets", "words"), [(0, 5), (1, 7), (9, 15), (25, 31)])
def test_an_entry_has_lifetimes_on_request_only(buckets: int, words: int) -> None:
    """An entry of the corrections has the same size and the same counters."""
    dtypes = entry_dtype(buckets), correction_dtype(buckets)
    for each in dtypes:
        assert each.itemsize == 8 * words
        assert ("lifetimes" in (each.names or ())) == bool(buckets)
    counters = [list((each.fields or {}).items())[-len(COUNTERS) :] for each in dtypes]
    assert counters[0] == counters[1]


rows_of_few_series = st.lists(
    st.tuples(
        st.sampled_from([4, 6]),
        st.sampled_from([0, OUTBOUND]),
        st.sampled_from([0, 1, 443, 65535]),
        st.sampled_from([0, 7]),
        st.sampled_from([0, 11, 2**63]),
    )
)


@given(rows_of_few_series, st.integers(1, 12))
def test_equal_series_are_grouped(rows: list[tuple[int, ...]], bits: int) -> None:
    """This holds if different series share an element of the table, too."""
    series = series_of_rows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(series_module, "TABLE_BITS", bits)
        found, place = grouped(series)
    assert found.tolist() == sorted({*series.tolist()})
    assert found[place].tolist() == series.tolist()
