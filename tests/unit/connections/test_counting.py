# SPDX-License-Identifier: GPL-3.0-only
"""Counts for any labels, compared with counts by a Python loop."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.config.values import LABELS
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.counting import Counts, Projection, Values, count
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import (
    NO_LISTENER,
    PORTS,
    SERIES_FIRST,
    TIME_SHIFT,
    Direction,
    OutboundPort,
    Parts,
    kernel_parts,
)
from tcpexporter.connections.record import (
    CLOSED,
    IPV4_PREFIX,
    LISTENER,
    SOCKET,
    Records,
    words,
)
from tcpexporter.connections.selection import (
    Selection,
    is_still_selected,
    listened,
    named,
    select,
)
from tcpexporter.connections.series import (
    FOLDED,
    OUTBOUND,
    REMOTE_PORT,
    SERIES,
    SERIES_BYTES,
    Ledger,
    Series,
)
from tcpexporter.connections.slot_counts import SlotCounts
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.metrics.owners import owner_of
from tcpexporter.metrics.series_labels import Labels, label_values
from tests.unit.made_cgroups import PATHS, WITHOUT_PATH, made_owners
from tests.unit.series_rows import Row, rows_of, series_of_rows

INBOUND = (Direction.INBOUND,)
BOTH = (Direction.INBOUND, Direction.OUTBOUND)
OWN_NETNS = 4026531840
OTHER_NETNS = 4026532017


class Connection(NamedTuple):
    port: int = 443
    version: int = 4
    direction: int = Direction.INBOUND
    netns: int = OWN_NETNS
    established_ns: int = 0
    remote_port: int = 0
    cgroup: int = 0

    @property
    def unit(self) -> int:
        """The time in units of 2^13 ns."""
        return self.established_ns >> TIME_SHIFT


def records(connections: Sequence[Connection]) -> Records:
    made = np.zeros(len(connections), SOCKET)
    for record, connection in zip(made, connections, strict=True):
        record["key"]["local_port"] = connection.port
        record["key"]["remote_port"] = connection.remote_port
        record["key"]["netns"] = connection.netns
        record["key"]["local_address"][-1] = 1
        if connection.version == 4:
            record["key"]["local_address"][:12] = IPV4_PREFIX
        record["established_ns"] = connection.established_ns
        record["cgroup"] = connection.cgroup
    made["is_outbound"] = [each.direction for each in connections]
    return made


def selection(
    *ports: int,
    tcpv6: bool = True,
    directions: Sequence[Direction] = INBOUND,
    own_listener: tuple[int, int] = NO_LISTENER,
    labels: Sequence[str] = ("port", "tcp_version"),
) -> Selection:
    return select(
        ports,
        tcpv6=tcpv6,
        directions=directions,
        own_listener=own_listener,
        labels=labels,
        owners=made_owners(labels),
    )


def values_of(counts: Counts, selected: Selection) -> list[Labels]:
    """Return the label values of each series."""
    assert isinstance(selected.owners, OwnerNumbers)
    return label_values(counts.series, selected.labels, {}, selected.owners.of)


def per_netns(selected: Selection) -> Selection:
    """Return the selection with namespaces counted separately."""
    return replace(selected, labels=(*selected.labels, "netns"))


def parts_of(selected: Selection) -> Parts:
    return kernel_parts(selected.directions, selected.labels, selected.own_listener)


def counted(
    connections: Sequence[Connection],
    selected: Selection,
    *since_ns: int,
    cuts: Sequence[int] = (),
) -> Counts:
    """Count connections, cut into chunks, with one bound at 0 if none is given."""
    ledger = MemoryLedger(parts_of(selected))
    chunks = [ledger.count(each) for each in np.split(records(connections), cuts)]
    return count(
        chunks, ledger.snapshot, SlotCounts(), Projection(selected), since_ns or [0]
    )


Shown = dict[tuple[int, int], int]


def established(counts: Counts) -> Shown:
    """Return counts of established connections above 0, by port and IP version."""
    return shown(counts.series, counts.values.established.tolist())


def long_term(counts: Counts) -> Shown:
    """Return counts of long-term connections above 0, by port and IP version."""
    return shown(counts.series, counts.values.ages[:, 0].tolist())


def shown(series: Series, numbers: Sequence[int]) -> Shown:
    rows = zip(rows_of(series), numbers, strict=True)
    found: Counter[tuple[int, int]] = Counter()
    for (version, _, port, _), number in rows:
        found[port, version] += number
    return {each: number for each, number in found.items() if number}


def ports_of(series: Series) -> set[tuple[int, int]]:
    return set(shown(series, [1] * len(series)))


def test_each_port_and_ip_version_has_its_own_count() -> None:
    """Each local port, including 1 and 65535, has one count for each IP version."""
    connections = (
        [Connection(443, 4)] * 7
        + [Connection(443, 6)] * 5
        + [Connection(8443, 6)] * 3
        + [Connection(1, 4)] * 2
        + [Connection(PORTS - 1, 6)] * 11
    )
    counts = counted(connections, selection())
    assert established(counts) == {
        (443, 4): 7,
        (443, 6): 5,
        (8443, 6): 3,
        (1, 4): 2,
        (PORTS - 1, 6): 11,
    }
    assert counts.total == 28


def test_only_selected_ports_are_counted() -> None:
    """Connections of other ports are only in the total."""
    connections = [Connection(port) for port in (442, 443, 443, 443, 444, 8000, 8001)]
    counts = counted(connections, selection(443, 8000))
    assert established(counts) == {(443, 4): 3, (8000, 4): 1}
    assert long_term(counts) == {(443, 4): 3, (8000, 4): 1}
    assert counts.total == 7


def test_an_empty_list_of_ports_selects_all_ports() -> None:
    """Every port of both IP versions is selected."""
    assert selection().ports.shape == (PORTS,)
    assert selection().ports.all()
    assert selection().ip_versions == (4, 6)


def test_without_tcpv6_no_ipv6_connection_is_counted() -> None:
    """There is no count and no listener of IP version 6."""
    selected = selection(443, 8443, tcpv6=False)
    counts = counted([Connection(443, 4)] * 3 + [Connection(443, 6)] * 5, selected)
    assert established(counts) == {(443, 4): 3}
    assert counts.total == 8
    listeners = np.array([(1, 443, 4, 0), (1, 443, 6, 0), (1, 8443, 6, 0)], LISTENER)
    assert ports_of(listened(listeners, selected)) == {(443, 4)}


@pytest.mark.parametrize(
    ("directions", "expected"),
    [(INBOUND, 3), ((Direction.OUTBOUND,), 5), (BOTH, 8), ((), 0)],
)
def test_directions_are_selected(directions: Sequence[Direction], expected: int) -> None:
    """A connection counts if its direction is selected; an empty slot never counts."""
    connections = [Connection(direction=Direction.INBOUND)] * 3 + [
        Connection(direction=Direction.OUTBOUND)
    ] * 5
    selected = selection(directions=directions)
    ledger = MemoryLedger(parts_of(selected))
    open_now = ledger.count(records(connections)).words
    chunk = np.append(open_now, [np.uint64(0)] * 7 + [CLOSED] * 7)
    counts = count([Chunk(chunk)], ledger.snapshot, SlotCounts(), Projection(selected), [0])
    assert counts.values.established.sum() == expected
    assert counts.total == 8


def test_own_listener_is_never_counted() -> None:
    """Connections to the exporter are not counted; those to the same port elsewhere are."""
    selected = per_netns(selection(own_listener=(OWN_NETNS, 9690)))
    connections = (
        [Connection(9690, netns=OWN_NETNS)] * 3
        + [Connection(9690, netns=OTHER_NETNS)] * 7
        + [Connection(9691, netns=OWN_NETNS)] * 11
    )
    counts = counted(connections, selected)
    assert established(counts) == {(9690, 4): 7, (9691, 4): 11}
    assert long_term(counts) == established(counts)
    assert counts.total == 21


def test_own_port_is_not_counted_without_counts_per_namespace() -> None:
    """All connections are then of the exporter's own namespace."""
    connections = [Connection(9690)] * 3 + [Connection(9691)] * 11
    counts = counted(connections, selection(own_listener=(OWN_NETNS, 9690)))
    assert established(counts) == {(9691, 4): 11}
    assert counts.total == 14


def test_own_listener_has_no_series() -> None:
    """The same port in another namespace has a series."""
    selected = per_netns(selection(own_listener=(OWN_NETNS, 9690)))
    listeners = np.array(
        [(OWN_NETNS, 9690, 4, 0), (OTHER_NETNS, 9690, 6, 0), (OWN_NETNS, 80, 4, 0)],
        LISTENER,
    )
    assert ports_of(listened(listeners, selected)) == {(9690, 6), (80, 4)}


def test_without_an_own_listener_every_port_counts() -> None:
    """With --once the exporter does not listen."""
    counts = counted([Connection(9690)] * 3, selection())
    assert established(counts) == {(9690, 4): 3}


def test_only_listeners_of_selected_ports_have_series() -> None:
    """A listener at another port has no series."""
    listeners = np.array(
        [(1, 443, 4, 0), (1, 443, 4, 0), (1, 443, 6, 0), (1, 80, 4, 0)], LISTENER
    )
    assert ports_of(listened(listeners, selection(443, 8443))) == {(443, 4), (443, 6)}
    assert ports_of(listened(listeners[:0], selection())) == set()


def test_a_named_port_has_a_series_for_each_selected_ip_version() -> None:
    """All series are of the given namespace."""
    assert ports_of(named((443, 80), OWN_NETNS, selection())) == {
        (443, 4),
        (443, 6),
        (80, 4),
        (80, 6),
    }
    assert ports_of(named((443,), OWN_NETNS, selection(tcpv6=False))) == {(443, 4)}
    assert ports_of(named((), OWN_NETNS, selection())) == set()


def test_namespaces_are_counted_separately_on_request() -> None:
    """The same port in two namespaces is two series with ``by_netns``, otherwise one."""
    connections = [Connection(netns=OWN_NETNS)] * 3 + [Connection(netns=OTHER_NETNS)] * 5
    together = counted(connections, selection())
    assert together.values.established.tolist() == [8]
    apart = counted(connections, per_netns(selection()))
    netns = apart.series.view(SERIES)["netns"].tolist()
    by_netns = dict(zip(netns, apart.values.established, strict=True))
    assert by_netns == {OWN_NETNS: 3, OTHER_NETNS: 5}


def test_a_connection_is_long_term_from_the_boundary_on() -> None:
    """A connection established at the boundary is long-term, 8,192 ns later is not."""
    boundary_ns = (10**13 + 1) << TIME_SHIFT
    connections = [
        *[Connection(established_ns=boundary_ns - 1)] * 3,
        *[Connection(established_ns=boundary_ns)] * 5,
        *[Connection(established_ns=boundary_ns + (1 << TIME_SHIFT))] * 7,
    ]
    counts = counted(connections, selection(), boundary_ns)
    assert established(counts) == {(443, 4): 15}
    assert long_term(counts) == {(443, 4): 8}


@pytest.mark.parametrize(("since_ns", "expected"), [(-1, 0), (-(2**63), 0), (0, 3)])
def test_a_boundary_before_boot_makes_no_connection_long_term(
    since_ns: int, expected: int
) -> None:
    """A host that booted less than the duration ago has no long-term connection."""
    counts = counted([Connection(established_ns=0)] * 3, selection(), since_ns)
    assert counts.values.ages.sum() == expected
    assert counts.values.established.sum() == 3


def test_without_connections_all_counts_are_0() -> None:
    """There is no chunk, or only an empty one."""
    ledger = MemoryLedger(parts_of(selection()))
    nothing: list[list[Chunk]] = [[], [ledger.count(records([]))]]
    for chunks in nothing:
        counts = count(chunks, ledger.snapshot, SlotCounts(), Projection(selection()), [0])
        values = counts.values
        assert counts.total == values.established.sum() == values.ages.sum() == 0


def test_a_chunk_is_not_read_after_the_next_is_requested() -> None:
    """A source may use the same buffer for each chunk."""

    ledger = MemoryLedger(parts_of(selection()))
    ledger.count(records([Connection(1)]))

    def one_buffer() -> Iterator[Chunk]:
        buffer = np.zeros(3, np.uint64)
        for port, times in ((80, 3), (443, 2)):
            buffer[:times] = ledger.count(records([Connection(port)] * times)).words
            yield Chunk(buffer[:times])
            buffer[:] = SERIES_FIRST

    counts = count(
        one_buffer(), ledger.snapshot, SlotCounts(), Projection(selection()), [0]
    )
    assert established(counts) == {(80, 4): 3, (443, 4): 2}


# Few values, among them those just below and above each boundary.
UNIT_NS = 1 << TIME_SHIFT
LATEST_NS = 2**59 - 1
TIMES_NS = [0, UNIT_NS - 1, UNIT_NS, 100 * UNIT_NS - 1, 100 * UNIT_NS, 101 * UNIT_NS]
any_connection = st.builds(
    Connection,
    port=st.sampled_from([1, 80, 443, 9690, PORTS - 1]),
    version=st.sampled_from([4, 6]),
    direction=st.sampled_from(list(Direction)),
    netns=st.sampled_from([OWN_NETNS, OTHER_NETNS, 2**32 - 1]),
    established_ns=st.sampled_from([*TIMES_NS, LATEST_NS]),
    remote_port=st.sampled_from([1, 80, 443, 9690, PORTS - 1]),
    cgroup=st.sampled_from([0, WITHOUT_PATH, *PATHS]),
)
some_connections = st.lists(any_connection, max_size=31)
some_labels = st.sets(st.sampled_from(LABELS)).map(
    lambda chosen: tuple(each for each in LABELS if each in chosen)
)
"""Any set of labels."""


def labels_of(connection: Connection, labels: Sequence[str]) -> Labels:
    """Return the label values of a connection, as the documents describe them."""
    is_outbound = connection.direction == Direction.OUTBOUND
    is_by_remote_port = is_outbound and "remote_port" in labels
    owner = owner_of(PATHS.get(connection.cgroup, "/"))
    values = {
        "unit": owner.unit,
        "container": owner.container,
        "pod": owner.pod,
        "port": "" if is_by_remote_port else str(connection.port),
        "tcp_version": str(connection.version),
        "direction": "outbound" if is_outbound else "inbound",
        "netns": str(connection.netns),
        "remote_port": str(connection.remote_port) if is_by_remote_port else "",
    }
    return tuple(values[each] for each in labels)


def is_selected(connection: Connection, selected: Selection) -> bool:
    """Return whether a connection is counted, as the documents describe it."""
    is_outbound = connection.direction == Direction.OUTBOUND
    is_by_remote_port = is_outbound and "remote_port" in selected.labels
    port = connection.remote_port if is_by_remote_port else connection.port
    listener = connection.netns, connection.port
    return (
        bool(selected.ports[port])
        and connection.version in selected.ip_versions
        and connection.direction in selected.directions
        and (is_outbound or listener != selected.own_listener)
    )


def is_old(connection: Connection, since_ns: int) -> bool:
    """Return whether a connection was established at this time or before."""
    return since_ns >= 0 and connection.unit <= since_ns >> TIME_SHIFT


def by_labels(
    counts: Counts, selected: Selection, numbers: Sequence[int]
) -> Counter[Labels]:
    rows = values_of(counts, selected)
    assert len(set(rows)) == len(rows)
    return +Counter(dict(zip(rows, numbers, strict=True)))


@given(
    connections=some_connections,
    cuts=st.lists(st.integers(0, 31), max_size=3),
    ports=st.sets(st.sampled_from([80, 443, 9690])),
    tcpv6=st.booleans(),
    directions=st.sampled_from([INBOUND, (Direction.OUTBOUND,), BOTH]),
    own_listener=st.sampled_from([NO_LISTENER, (OWN_NETNS, 9690), (OTHER_NETNS, 80)]),
    labels=some_labels,
    since_ns=st.sampled_from([-1, *TIMES_NS, LATEST_NS - UNIT_NS]),
)
def test_counts_are_those_of_a_python_loop(
    *,
    connections: list[Connection],
    cuts: list[int],
    ports: set[int],
    tcpv6: bool,
    directions: tuple[Direction, ...],
    own_listener: tuple[int, int],
    labels: tuple[str, ...],
    since_ns: int,
) -> None:
    """This holds for any connections, any chunks, any labels and any selection."""
    selected = selection(
        *ports,
        tcpv6=tcpv6,
        directions=directions,
        own_listener=own_listener,
        labels=labels,
    )
    expected = [each for each in connections if is_selected(each, selected)]
    old = [each for each in expected if is_old(each, since_ns)]
    counts = counted(connections, selected, since_ns, cuts=sorted(cuts))
    values = counts.values
    assert by_labels(counts, selected, values.established.tolist()) == Counter(
        labels_of(each, labels) for each in expected
    )
    assert by_labels(counts, selected, values.ages[:, 0].tolist()) == Counter(
        labels_of(each, labels) for each in old
    )
    assert counts.total == len(connections)
    assert (counts.series[1:] > counts.series[:-1]).all()


@given(
    connections=some_connections,
    since_ns=st.lists(st.sampled_from([-1, *TIMES_NS]), unique=True, min_size=1),
    labels=some_labels,
)
def test_ages_are_those_of_a_python_loop(
    connections: list[Connection], since_ns: list[int], labels: tuple[str, ...]
) -> None:
    """This holds for any number of bounds. The sum of the ages is exact in units."""
    since_ns.sort(reverse=True)
    now_ns = LATEST_NS
    selected = selection(directions=BOTH, labels=labels)
    ledger = MemoryLedger(parts_of(selected))
    chunk = ledger.count(records(connections))
    counts = count(
        [chunk],
        ledger.snapshot,
        SlotCounts(),
        Projection(selected),
        since_ns,
        now_ns=now_ns,
    )
    rows = values_of(counts, selected)
    assert counts.values.ages.shape == (len(rows), len(since_ns))
    for row, ages, total in zip(
        rows, counts.values.ages.tolist(), counts.values.ages_sum.tolist(), strict=True
    ):
        here = [each for each in connections if labels_of(each, labels) == row]
        assert ages == [
            sum(each.unit <= since >> TIME_SHIFT for each in here) if since >= 0 else 0
            for since in since_ns
        ]
        assert total == sum((now_ns >> TIME_SHIFT) - each.unit for each in here)
    assert len({*rows}) == len({labels_of(each, labels) for each in connections})


def test_ages_are_added_up_on_request_only() -> None:
    """Without the present time, the sum of the ages is 0."""
    counts = counted([Connection(established_ns=UNIT_NS)] * 3, selection())
    assert counts.values.ages_sum.tolist() == [0]


@given(
    pre_existing=some_connections,
    opened=some_connections,
    closed=st.integers(0, 31),
    is_small=st.booleans(),
    labels=st.lists(some_labels, min_size=2, max_size=5),
    data=st.data(),
)
def test_sums_are_the_same_for_any_labels(
    *,
    pre_existing: list[Connection],
    opened: list[Connection],
    closed: int,
    is_small: bool,
    labels: list[tuple[str, ...]],
    data: st.DataObject,
) -> None:
    """This holds for every value: gauges, counters and histograms.

    It holds as well if the ledger has no capacity for more than two series. In every
    series, opened - closed is established - pre-existing.
    """
    everything = [*pre_existing, *opened]
    order = data.draw(st.permutations(range(len(everything))))
    directions = data.draw(st.sampled_from([BOTH, INBOUND, (Direction.OUTBOUND,)]))
    is_closed = np.zeros(len(everything), np.bool_)
    is_closed[order[:closed]] = True
    sums = []
    for each in labels:
        selected = selection(directions=directions, labels=each)
        with pytest.MonkeyPatch.context() as patch:
            if is_small:
                patch.setattr("tcpexporter.connections.memory_ledger.CAPACITY", 2)
            ledger = MemoryLedger(parts_of(selected), (1.0, 6.0))
            all_words = ledger.count(records(everything)).words
        ledger.record_pre_existing(all_words[: len(pre_existing)])
        ledger.record_opened(all_words[len(pre_existing) :])
        ledger.record_closed(all_words[is_closed], LATEST_NS)
        counts = count(
            [Chunk(all_words[~is_closed])],
            ledger.snapshot,
            SlotCounts(),
            Projection(selected),
            [100 * UNIT_NS, 0],
            now_ns=LATEST_NS,
        )
        values = counts.values
        balance = values.opened - values.closed - values.established + values.pre_existing
        assert not balance.any()
        assert (values.lifetimes.sum(axis=1) == values.closed).all()
        by_labels(counts, selected, [1] * len(counts.series))
        sums.append(totals(values))
    assert all(each == sums[0] for each in sums)


def totals(values: Values) -> dict[str, list[int]]:
    """Return the sum of each value over all series."""
    return {
        each.name: np.atleast_1d(getattr(values, each.name).sum(axis=0)).tolist()
        for each in fields(values)
    }


def ledger_of(series: list[Row]) -> Ledger:
    """Return a ledger in which nothing has happened, with these series from number 5 on."""
    rows = np.zeros(SERIES_FIRST + len(series), SERIES_BYTES)
    rows[SERIES_FIRST:] = series_of_rows(series)
    zeros = np.zeros(len(rows), np.int64)
    return Ledger(
        rows,
        zeros,
        zeros,
        zeros,
        zeros,
        zeros,
        np.zeros((len(rows), 0), np.int64),
    )


FREE = (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([(4, 0, 443, 0)], [(4, 0, 443, 0)], {(443, 4): 3}),
        ([(4, 0, 443, 0)], [(4, 0, 80, 0)], {}),
        ([(4, 0, 443, 0)], [(6, 0, 443, 0)], {}),
        ([(4, 0, 443, 0)], [FREE], {}),
        ([FREE], [(4, 0, 80, 0)], {(80, 4): 3}),
        ([], [(4, 0, 80, 0)], {(80, 4): 3}),
        ([(4, 0, 443, 0)], [], {}),
        ([(4, 0, 443, 0), FREE], [(4, 0, 443, 0)], {(443, 4): 3}),
        ([(4, 0, 443, 0)], [(4, 0, 443, 0), (4, 0, 80, 0)], {(443, 4): 3}),
    ],
)
def test_connections_of_a_freed_number_are_not_those_of_its_next_series(
    before: list[tuple[int, int, int, int]],
    after: list[tuple[int, int, int, int]],
    expected: Shown,
) -> None:
    """A number is freed, and gets another series, while the connections are read.

    They had closed before. A number that had no series before is a new one. The clients
    of the closed connections are not counted in the number's next series.
    """
    answers = iter([ledger_of(before), ledger_of(after)])
    chunk = words(np.full(3, SERIES_FIRST, np.uint32), np.full(3, UNIT_NS, np.uint64))
    counts = count(
        [Chunk(chunk, np.arange(3, dtype=np.uint64))],
        lambda: next(answers),
        SlotCounts(),
        Projection(selection()),
        [UNIT_NS],
        long_term_ns=UNIT_NS,
    )
    clients = counts.clients()
    assert clients is not None
    assert clients.established.sum() == sum(expected.values())
    assert established(counts) == long_term(counts) == expected
    assert counts.total == sum(expected.values())


def test_a_projection_follows_the_series_of_the_ledger() -> None:
    """What it keeps from scrape to scrape is replaced when a number has another series."""
    projection = Projection(selection())
    chunk = words(np.array([5, 5, 6], np.uint32), np.zeros(3, np.uint64))
    for series, expected in (
        ([(4, 0, 443, 0), (4, 0, 80, 0)], {(443, 4): 2, (80, 4): 1}),
        ([(4, 0, 443, 0), (4, 0, 80, 0)], {(443, 4): 2, (80, 4): 1}),
        ([(4, 0, 22, 0), (4, 0, 80, 0)], {(22, 4): 2, (80, 4): 1}),
        ([(4, 0, 22, 0), (6, 0, 22, 0), FREE], {(22, 4): 2, (22, 6): 1}),
        ([(4, 0, 22, 0), (4, OUTBOUND, 22, 0)], {(22, 4): 2}),
    ):
        counts = count(
            [Chunk(chunk)], partial(ledger_of, series), SlotCounts(), projection, [0]
        )
        assert established(counts) == expected


@pytest.mark.parametrize("failing", ["is_selected", "projected", "listened"])
def test_a_projection_is_right_after_memory_was_short(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when the series or the listeners have changed, and is repeated."""
    projection = Projection(selection())
    chunk = words(np.array([5, 5, 6], np.uint32), np.zeros(3, np.uint64))

    def scrape(series: list[Row], listener: int) -> tuple[Shown, list[int]]:
        counts = count(
            [Chunk(chunk)], partial(ledger_of, series), SlotCounts(), projection, [0]
        )
        listening = projection.listened(np.array([(0, listener, 4, 0)], LISTENER))
        return established(counts), [port for _, _, port, _ in rows_of(listening)]

    def refuse(*_: object) -> None:
        raise MemoryError

    scrape([(4, 0, 443, 0), (4, 0, 80, 0)], 443)
    changed = [(4, 0, 22, 0), (4, 0, 80, 0)]
    monkeypatch.setattr(f"tcpexporter.connections.counting.{failing}", refuse)
    with pytest.raises(MemoryError):
        scrape(changed, 22)
    monkeypatch.undo()
    assert scrape(changed, 22) == ({(22, 4): 2, (80, 4): 1}, [22])


@pytest.mark.parametrize(
    ("directions", "labels", "expected"),
    [
        (INBOUND, ("port", "tcp_version"), OutboundPort.NONE),
        (INBOUND, ("remote_port",), OutboundPort.NONE),
        ((Direction.OUTBOUND,), ("port", "tcp_version"), OutboundPort.LOCAL),
        (BOTH, ("port", "tcp_version"), OutboundPort.LOCAL),
        (BOTH, (), OutboundPort.LOCAL),
        (BOTH, ("port", "remote_port"), OutboundPort.REMOTE),
        ((Direction.OUTBOUND,), ("remote_port",), OutboundPort.REMOTE),
    ],
)
def test_the_kernel_counts_by_the_port_that_a_label_requires(
    directions: Sequence[Direction], labels: Sequence[str], expected: OutboundPort
) -> None:
    """Outbound connections that are not selected are not counted by port."""
    own = (OWN_NETNS, 9690)
    assert kernel_parts(directions, labels) == Parts(expected, by_netns=False)
    by_both = kernel_parts(directions, (*labels, "netns", "unit"), own)
    assert by_both == Parts(expected, by_netns=True, own_listener=own, by_cgroup=True)


@pytest.mark.parametrize(
    ("directions", "labels", "expected"),
    [
        (INBOUND, ("port",), [(0, 0, 443, 0)]),
        (INBOUND, ("tcp_version",), [(4, 0, 0, 0), (6, 0, 0, 0)]),
        (INBOUND, ("direction",), [(0, 0, 0, 0)]),
        (INBOUND, (), [(0, 0, 0, 0)]),
        (BOTH, ("port", "direction"), [(0, 0, 443, 0)]),
        (BOTH, ("port", "remote_port"), [(0, 0, 443, 0), (0, REMOTE_PORT, 443, 0)]),
        (
            BOTH,
            ("direction", "remote_port"),
            [(0, 0, 0, 0), (0, OUTBOUND | REMOTE_PORT, 443, 0)],
        ),
        ((Direction.OUTBOUND,), ("port",), [(0, 0, 443, 0)]),
        ((Direction.OUTBOUND,), ("port", "direction"), []),
        ((Direction.OUTBOUND,), ("remote_port",), [(0, REMOTE_PORT, 443, 0)]),
    ],
)
def test_a_named_port_has_the_series_that_its_connections_would_have(
    directions: Sequence[Direction],
    labels: Sequence[str],
    expected: list[tuple[int, int, int, int]],
) -> None:
    """A remote port that is named has a series too, if the labels have it."""
    selected = selection(443, directions=directions, labels=labels)
    assert rows_of(named((443,), OWN_NETNS, selected)) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("port", "tcp_version"), [True, False, False]),
        (("remote_port",), [True, False, False]),
        (("tcp_version",), [True, True, True]),
        ((), [True, True, True]),
    ],
)
def test_series_of_ports_that_are_not_selected_any_more_are_removed(
    labels: Sequence[str], expected: list[bool]
) -> None:
    """A series without the label port is kept; one with port other is removed."""
    rows = [(4, 0, 443, 0), (4, 0, 80, 0), (4, FOLDED, 0, 0)]
    published = series_of_rows(rows)
    found = is_still_selected(published, selection(443, labels=labels))
    assert found.tolist() == expected
    assert is_still_selected(published, selection(labels=labels)).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("port", "tcp_version"), {("443", "4"): 3, ("other", "4"): 12}),
        (("port", "direction"), {("443", "inbound"): 3, ("other", "inbound"): 5}),
        (("port", "remote_port"), {("443", ""): 3, ("other", ""): 5, ("", "other"): 7}),
        (("remote_port",), {("",): 8, ("other",): 7}),
        (("tcp_version",), {("4",): 15}),
        (("netns",), {("7",): 3, ("other",): 12}),
        (("netns", "remote_port"), {("7", ""): 3, ("other", ""): 5, ("other", "other"): 7}),
        ((), {(): 15}),
    ],
)
def test_series_that_the_source_has_folded_are_other(
    labels: tuple[str, ...], expected: dict[Labels, int]
) -> None:
    """They are added to the series that has the same label values, if there is one.

    The source has no number free for connections from port 80 and to port 5432.
    """
    selected = selection(directions=BOTH, labels=labels)
    connections = [
        *[Connection(443, netns=7)] * 3,
        *[Connection(80, netns=11)] * 5,
        *[Connection(40001, 4, Direction.OUTBOUND, 11, remote_port=5432)] * 7,
    ]
    if "direction" in labels:
        connections = connections[:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpexporter.connections.memory_ledger.CAPACITY", 1)
        ledger = MemoryLedger(parts_of(selected))
        chunks = [ledger.count(records([each])) for each in connections]
    counts = count(chunks, ledger.snapshot, SlotCounts(), Projection(selected), [0])
    assert by_labels(counts, selected, counts.values.established.tolist()) == expected
