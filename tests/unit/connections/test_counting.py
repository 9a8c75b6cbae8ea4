# SPDX-License-Identifier: GPL-3.0-only
"""Counts per port and IP version, compared with counts by a Python loop."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpexporter.connections.counting import (
    SERIES,
    Counts,
    Selection,
    Series,
    count,
    fold,
    listened,
    named,
    select,
)
from tcpexporter.connections.record import (
    CONNECTION,
    IPV4_PREFIX,
    LISTENER,
    PORTS,
    Direction,
    Records,
    groups,
)

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


def records(connections: Sequence[Connection]) -> Records:
    made = np.zeros(len(connections), CONNECTION)
    for record, connection in zip(made, connections, strict=True):
        record["key"]["local_port"] = connection.port
        record["key"]["netns"] = connection.netns
        record["key"]["local_address"][-1] = 1
        if connection.version == 4:
            record["key"]["local_address"][:12] = IPV4_PREFIX
        record["established_ns"] = connection.established_ns
    made["group"] = groups(made["key"], np.array([each.direction for each in connections]))
    return made


def selection(
    *ports: int,
    tcpv6: bool = True,
    directions: Sequence[Direction] = INBOUND,
    own_listener: tuple[int, int] | None = None,
) -> Selection:
    return select(ports, tcpv6=tcpv6, directions=directions, own_listener=own_listener)


def counted(
    connections: Sequence[Connection], selected: Selection, since_ns: int = 0
) -> Counts:
    return count([records(connections)], selected, since_ns)


Shown = dict[tuple[int, int], int]


def established(counts: Counts) -> Shown:
    """Return counts of established connections above 0, by port and IP version."""
    return shown(counts.series, counts.established.tolist())


def long_term(counts: Counts) -> Shown:
    """Return counts of long-term connections above 0, by port and IP version."""
    return shown(counts.series, counts.long_term.tolist())


def shown(series: Series, numbers: Sequence[int]) -> Shown:
    rows = zip(series.view(SERIES).tolist(), numbers, strict=True)
    found: Counter[tuple[int, int]] = Counter()
    for (version, port, _), number in rows:
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
    listeners = np.array([(1, 443, 4), (1, 443, 6), (1, 8443, 6)], LISTENER)
    assert ports_of(listened(listeners, selected)) == {(443, 4)}


@pytest.mark.parametrize(
    ("directions", "expected"),
    [(INBOUND, 3), ((Direction.OUTBOUND,), 5), (BOTH, 8), ((), 0)],
)
def test_directions_are_selected(directions: Sequence[Direction], expected: int) -> None:
    """A connection counts if its direction is selected; an empty slot never counts."""
    connections = (
        [Connection(direction=Direction.INBOUND)] * 3
        + [Connection(direction=Direction.OUTBOUND)] * 5
        + [Connection(port=0)] * 7
    )
    counts = counted(connections, selection(directions=directions))
    assert counts.established.sum() == expected
    assert counts.total == 8


def test_own_listener_is_never_counted() -> None:
    """Connections to the exporter are not counted; those to the same port elsewhere are."""
    selected = replace(selection(own_listener=(OWN_NETNS, 9690)), by_netns=True)
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
    selected = selection(own_listener=(OWN_NETNS, 9690))
    listeners = np.array(
        [(OWN_NETNS, 9690, 4), (0, 9690, 4), (OTHER_NETNS, 9690, 6), (OWN_NETNS, 80, 4)],
        LISTENER,
    )
    assert ports_of(listened(listeners, selected)) == {(9690, 6), (80, 4)}


def test_without_an_own_listener_every_port_counts() -> None:
    """With --once the exporter does not listen."""
    counts = counted([Connection(9690)] * 3, selection())
    assert established(counts) == {(9690, 4): 3}


def test_only_listeners_of_selected_ports_have_series() -> None:
    """A listener at another port has no series."""
    listeners = np.array([(1, 443, 4), (1, 443, 4), (1, 443, 6), (1, 80, 4)], LISTENER)
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
    assert together.established.tolist() == [8]
    apart = counted(connections, replace(selection(), by_netns=True))
    by_netns = dict(
        zip(apart.series.view(SERIES)["netns"].tolist(), apart.established, strict=True)
    )
    assert by_netns == {OWN_NETNS: 3, OTHER_NETNS: 5}


def test_a_connection_is_long_term_from_the_boundary_on() -> None:
    """A connection established at the boundary is long-term, 1 ns later is not."""
    boundary_ns = 10**18 + 1
    connections = [
        *[Connection(established_ns=boundary_ns - 1)] * 3,
        *[Connection(established_ns=boundary_ns)] * 5,
        *[Connection(established_ns=boundary_ns + 1)] * 7,
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
    assert counts.long_term.sum() == expected
    assert counts.established.sum() == 3


def test_without_connections_all_counts_are_0() -> None:
    """There is no chunk, or only an empty one."""
    for chunks in ([], [records([])]):
        counts = count(chunks, selection(), 0)
        assert counts.total == counts.established.sum() == counts.long_term.sum() == 0


def test_a_chunk_is_not_read_after_the_next_is_requested() -> None:
    """A source may use the same buffer for each chunk."""

    def one_buffer() -> Iterator[Records]:
        buffer = np.zeros(3, CONNECTION)
        for port, times in ((80, 3), (443, 2)):
            buffer[:times] = records([Connection(port)] * times)
            yield buffer[:times]
            buffer["key"]["local_port"] = 1

    counts = count(one_buffer(), selection(), 0)
    assert established(counts) == {(80, 4): 3, (443, 4): 2}


# Few values, among them those just below and above each boundary.
some_connections = st.lists(
    st.builds(
        Connection,
        port=st.sampled_from([1, 80, 443, 9690, PORTS - 1]),
        version=st.sampled_from([4, 6]),
        direction=st.sampled_from(list(Direction)),
        netns=st.sampled_from([OWN_NETNS, OTHER_NETNS, 2**32 - 1]),
        established_ns=st.sampled_from([0, 99, 100, 101, 2**64 - 1]),
    ),
    max_size=31,
)


@settings(deadline=None)
@given(
    connections=some_connections,
    cuts=st.lists(st.integers(0, 31), max_size=3),
    ports=st.sets(st.sampled_from([80, 443, 9690])),
    tcpv6=st.booleans(),
    directions=st.sampled_from([INBOUND, (Direction.OUTBOUND,), BOTH]),
    own_listener=st.sampled_from([None, (OWN_NETNS, 9690), (OTHER_NETNS, 80)]),
    by_netns=st.booleans(),
    since_ns=st.sampled_from([-1, 0, 99, 100, 101, 2**63]),
)
def test_counts_are_those_of_a_python_loop(
    *,
    connections: list[Connection],
    cuts: list[int],
    ports: set[int],
    tcpv6: bool,
    directions: tuple[Direction, ...],
    own_listener: tuple[int, int] | None,
    by_netns: bool,
    since_ns: int,
) -> None:
    """This holds for any connections, any chunks and any selection."""
    expected = [
        each
        for each in connections
        if (not ports or each.port in ports)
        and (tcpv6 or each.version == 4)
        and each.direction in directions
        and not (
            own_listener
            and each.port == own_listener[1]
            and (not by_netns or each.netns == own_listener[0])
        )
    ]
    old = [each for each in expected if since_ns >= 0 and each.established_ns <= since_ns]
    chunks = np.split(records(connections), sorted(cuts))
    selected = replace(
        selection(*ports, tcpv6=tcpv6, directions=directions, own_listener=own_listener),
        by_netns=by_netns,
    )
    counts = count(chunks, selected, since_ns)
    assert established(counts) == Counter((each.port, each.version) for each in expected)
    assert long_term(counts) == Counter((each.port, each.version) for each in old)
    assert counts.total == len(connections)


class SeriesKey(NamedTuple):
    """A series; its fields have the order in which series are sorted."""

    netns: int
    port: int
    version: int = 4


def keys_of(series: Series) -> list[SeriesKey]:
    return [
        SeriesKey(netns, port, version)
        for version, port, netns in series.view(SERIES).tolist()
    ]


def series_of(chosen: Iterable[SeriesKey]) -> Series:
    rows = [(version, port, netns) for netns, port, version in sorted(set(chosen))]
    return np.array(rows, SERIES).view(np.uint64)


def ports_in(*ports: int, netns: int = 0) -> list[SeriesKey]:
    return [SeriesKey(netns, port) for port in ports]


def counts_of(numbers: dict[SeriesKey, int]) -> Counts:
    """Counts with these numbers of established connections; a third is long-term."""
    established = np.array([numbers[each] for each in sorted(numbers)], np.int64)
    return Counts(series_of(numbers), established, established // 3, 1009)


def folded(
    numbers: dict[SeriesKey, int],
    max_series: int,
    *,
    listening: Iterable[SeriesKey] = (),
    named: Iterable[SeriesKey] = (),
    published: Iterable[SeriesKey] = (),
) -> tuple[dict[SeriesKey, int], int]:
    """Return the connections of each exposed series, and the number of folded series."""
    exposed, number = fold(
        counts_of(numbers),
        listening=series_of(listening),
        named=series_of(named),
        published=series_of(published),
        max_series=max_series,
    )
    return dict(
        zip(keys_of(exposed.series), exposed.established.tolist(), strict=True)
    ), number


OTHER = SeriesKey(0, 0)
"""Return the series that contain folded ones."""


def test_nothing_is_folded_below_the_limit() -> None:
    """With exactly ``max_series`` series all are exposed, and no series with port 0."""
    numbers = dict(zip(ports_in(22, 443), (3, 5), strict=True))
    shown = folded(numbers, 5, listening=ports_in(22, 80), published=ports_in(8080, 8443))
    assert shown == ({**numbers, **dict.fromkeys(ports_in(80, 8080, 8443), 0)}, 0)


def test_the_smallest_are_folded() -> None:
    """Those with the fewest connections become one series for each IP version."""
    numbers = {
        SeriesKey(0, 22): 2,
        SeriesKey(0, 22, 6): 3,
        SeriesKey(0, 80): 7,
        SeriesKey(0, 443): 5,
        SeriesKey(0, 443, 6): 11,
        SeriesKey(0, 8443): 1,
    }
    assert folded(numbers, 3) == (
        {
            OTHER: 3,
            SeriesKey(0, 0, 6): 3,
            SeriesKey(0, 80): 7,
            SeriesKey(0, 443): 5,
            SeriesKey(0, 443, 6): 11,
        },
        3,
    )


def test_a_listener_counts_as_one_connection() -> None:
    """A listener without connections is kept rather than a port with 1 connection, but
    not rather than one with 2."""
    numbers = dict(zip(ports_in(443, 50021, 50023), (2, 1, 1), strict=True))
    (listener,) = ports_in(60013)
    assert folded(numbers, 2, listening=[listener]) == (
        {OTHER: 2, SeriesKey(0, 443): 2, listener: 0},
        2,
    )
    (busy,) = ports_in(50021)
    assert folded({**numbers, busy: 3}, 2, listening=[listener])[0].keys() == {
        OTHER,
        SeriesKey(0, 443),
        busy,
    }


def test_among_equal_series_published_ones_stay() -> None:
    """A new series of equal size replaces no published one, even if its port is lower."""
    listening = ports_in(22, 80, 443, 8443)
    shown, number = folded({}, 2, listening=listening, published=ports_in(443, 8443))
    assert shown == dict.fromkeys([OTHER, *ports_in(443, 8443)], 0)
    assert number == 2
    assert folded({}, 2, listening=listening)[0].keys() == {OTHER, *ports_in(22, 80)}


def test_a_series_that_is_not_in_use_is_dropped_and_not_folded() -> None:
    """A published series without connections is replaced by one that has some."""
    shown = folded({SeriesKey(0, 443): 3}, 2, published=ports_in(22, 80))
    assert shown == ({SeriesKey(0, 22): 0, SeriesKey(0, 443): 3}, 0)


def test_named_ports_are_never_folded() -> None:
    """The limit may be exceeded, and other series share the remaining capacity."""
    named_ports = ports_in(22, 80, 443)
    numbers = dict(zip(ports_in(443, 5432, 8443), (1, 13, 17), strict=True))
    shown = folded(numbers, 2, named=named_ports)
    kept = {**dict.fromkeys(named_ports, 0), SeriesKey(0, 443): 1}
    assert shown == ({OTHER: 30, **kept}, 2)
    shown = folded(numbers, 4, named=named_ports)
    assert shown == ({OTHER: 13, **kept, SeriesKey(0, 8443): 17}, 1)


def test_the_series_with_port_0_stays_once_it_is_published() -> None:
    """It is 0 when nothing is folded into it, and does not count toward the limit."""
    shown = folded({SeriesKey(0, 443): 3}, 1, published=[OTHER, SeriesKey(0, 443)])
    assert shown == ({OTHER: 0, SeriesKey(0, 443): 3}, 0)


def test_each_namespace_has_its_own_series_with_port_0() -> None:
    """There is one for each namespace and IP version that has folded series."""
    largest = {SeriesKey(7, 443): 13, SeriesKey(7, 8443): 11}
    numbers = {**largest, SeriesKey(7, 22): 1, SeriesKey(7, 80): 2, SeriesKey(11, 22, 6): 5}
    others = {SeriesKey(7, 0): 3, SeriesKey(11, 0, 6): 5}
    assert folded(numbers, 2) == ({**largest, **others}, 3)


def test_the_limit_holds_for_many_namespaces() -> None:
    """More namespaces than ``max_series`` share one series with port 0."""
    numbers = {SeriesKey(netns, 443): 1 for netns in range(101, 101 + 31)}
    shown, number = folded(numbers, 5, published=[SeriesKey(129, 0)])
    assert number == 31 - 5
    assert {each for each in shown if each.port} == {*list(numbers)[:5]}
    assert {each.netns: shown[each] for each in shown if not each.port} == {
        0: 31 - 5 - 5,
        **dict.fromkeys([106, 107, 108, 109, 129], 1),
    }


any_series = st.builds(
    SeriesKey,
    netns=st.sampled_from([0, 7, 11, 2**32 - 1]),
    port=st.sampled_from([1, 2, 80, 443, PORTS - 1]),
    version=st.sampled_from([4, 6]),
)
any_series_with_port_0 = st.builds(
    SeriesKey,
    netns=st.sampled_from([0, 7, 11]),
    port=st.just(0),
    version=st.sampled_from([4, 6]),
)


@settings(deadline=None)
@given(
    numbers=st.dictionaries(any_series, st.sampled_from([1, 2, 3, 5, 2**40]), max_size=31),
    listening=st.sets(any_series),
    named_series=st.sets(any_series, max_size=5),
    published=st.sets(any_series | any_series_with_port_0),
    max_series=st.integers(1, 31),
)
def test_folding_keeps_the_sums(
    *,
    numbers: dict[SeriesKey, int],
    listening: set[SeriesKey],
    named_series: set[SeriesKey],
    published: set[SeriesKey],
    max_series: int,
) -> None:
    """The limit holds, the largest series stay, and folding again changes nothing."""
    counts = counts_of(numbers)
    given_series = {"listening": series_of(listening), "named": series_of(named_series)}
    exposed, number = fold(
        counts, **given_series, published=series_of(published), max_series=max_series
    )
    assert exposed.total == counts.total
    for version in (4, 6):
        was, is_now = (each.series.view(SERIES)["ip_version"] for each in (counts, exposed))
        for before, now in (
            (counts.established, exposed.established),
            (counts.long_term, exposed.long_term),
        ):
            assert now[is_now == version].sum() == before[was == version].sum()
    assert (np.diff(exposed.series.astype(object)) > 0).all()
    kept = {each for each in keys_of(exposed.series) if each.port}
    used = {*numbers, *listening, *named_series}
    assert named_series <= kept
    assert len(kept) <= max(max_series, len(named_series))
    assert len(exposed.series) - len(kept) <= max_series + 2
    assert number == len(used - kept)
    if number:
        assert len(kept) == max(max_series, len(named_series))

    def worth(key: SeriesKey) -> tuple[int, bool, bool]:
        is_listened = key in listening
        return numbers.get(key, 0) + is_listened, is_listened, key in published

    smallest = min(map(worth, kept - named_series), default=None)
    assert smallest is None or all(worth(each) <= smallest for each in used - kept)
    again, _ = fold(counts, **given_series, published=exposed.series, max_series=max_series)
    assert again.series.tolist() == exposed.series.tolist()
    assert again.established.tolist() == exposed.established.tolist()


@settings(deadline=None)
@given(
    connections=some_connections, seed=st.integers(0, 2**32), max_series=st.integers(1, 7)
)
def test_the_order_of_connections_does_not_change_the_counts(
    connections: list[Connection], seed: int, max_series: int
) -> None:
    """The folded counts are equal for any order of the same connections."""
    selected = replace(selection(directions=BOTH), by_netns=True)
    shuffled = random.Random(seed).sample(connections, len(connections))  # noqa: S311
    nothing = series_of([])
    first, second = (
        fold(
            counted(each, selected, 100),
            listening=nothing,
            named=nothing,
            published=nothing,
            max_series=max_series,
        )
        for each in (connections, shuffled)
    )
    assert first[1] == second[1]
    assert first[0].series.tolist() == second[0].series.tolist()
    assert first[0].established.tolist() == second[0].established.tolist()
    assert first[0].long_term.tolist() == second[0].long_term.tolist()
