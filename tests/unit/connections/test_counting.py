# SPDX-License-Identifier: GPL-3.0-only
"""Counts per port and IP version, against what plain Python counts."""

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
    """What is not 0, by port and IP version."""
    return shown(counts.series, counts.established.tolist())


def long_term(counts: Counts) -> Shown:
    """Likewise."""
    return shown(counts.series, counts.long_term.tolist())


def shown(series: Series, numbers: Sequence[int]) -> Shown:
    rows = zip(series.view(SERIES).tolist(), numbers, strict=True)
    found: Counter[tuple[int, int]] = Counter()
    for (version, port, _), number in rows:
        found[port, version] += number
    return {each: number for each, number in found.items() if number}


def ports_of(series: Series) -> set[tuple[int, int]]:
    return set(shown(series, [1] * len(series)))


def test_ports_and_ip_versions_are_counted_apart() -> None:
    """Each local port has a count for each IP version, the first and last port too."""
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
    """Other ports are in the total alone."""
    connections = [Connection(port) for port in (442, 443, 443, 443, 444, 8000, 8001)]
    counts = counted(connections, selection(443, 8000))
    assert established(counts) == {(443, 4): 3, (8000, 4): 1}
    assert long_term(counts) == {(443, 4): 3, (8000, 4): 1}
    assert counts.total == 7


def test_no_ports_are_all_ports() -> None:
    """Without a choice every port of both versions is selected."""
    assert selection().ports.shape == (PORTS,)
    assert selection().ports.all()
    assert selection().ip_versions == (4, 6)


def test_ipv6_can_be_left_out() -> None:
    """Without tcpv6 there is no count and no listener of IP version 6."""
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
    """A connection counts when its direction is one of those; an empty place, never."""
    connections = (
        [Connection(direction=Direction.INBOUND)] * 3
        + [Connection(direction=Direction.OUTBOUND)] * 5
        + [Connection(port=0)] * 7
    )
    counts = counted(connections, selection(directions=directions))
    assert counts.established.sum() == expected
    assert counts.total == 8


def test_own_listener_is_never_counted() -> None:
    """Connections to the exporter are left out, those of another namespace are not."""
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


def test_own_port_is_not_counted_where_namespaces_are_not_told_apart() -> None:
    """Then all connections are of one namespace, which is ours if we have a listener."""
    connections = [Connection(9690)] * 3 + [Connection(9691)] * 11
    counts = counted(connections, selection(own_listener=(OWN_NETNS, 9690)))
    assert established(counts) == {(9691, 4): 11}
    assert counts.total == 14


def test_own_listener_is_not_listened() -> None:
    """Our own port is no listener, that of another namespace is."""
    selected = selection(own_listener=(OWN_NETNS, 9690))
    listeners = np.array(
        [(OWN_NETNS, 9690, 4), (0, 9690, 4), (OTHER_NETNS, 9690, 6), (OWN_NETNS, 80, 4)],
        LISTENER,
    )
    assert ports_of(listened(listeners, selected)) == {(9690, 6), (80, 4)}


def test_without_an_own_listener_nothing_is_left_out() -> None:
    """With --once there is none: every port counts."""
    counts = counted([Connection(9690)] * 3, selection())
    assert established(counts) == {(9690, 4): 3}


def test_listened_ports_are_selected_ones() -> None:
    """A listener on another port, or of no port at all, has no part in it."""
    listeners = np.array([(1, 443, 4), (1, 443, 4), (1, 443, 6), (1, 80, 4)], LISTENER)
    assert ports_of(listened(listeners, selection(443, 8443))) == {(443, 4), (443, 6)}
    assert ports_of(listened(listeners[:0], selection())) == set()


def test_named_ports_are_of_both_versions_that_are_selected() -> None:
    """A named port has a series for each IP version, in the one namespace."""
    assert ports_of(named((443, 80), OWN_NETNS, selection())) == {
        (443, 4),
        (443, 6),
        (80, 4),
        (80, 6),
    }
    assert ports_of(named((443,), OWN_NETNS, selection(tcpv6=False))) == {(443, 4)}
    assert ports_of(named((), OWN_NETNS, selection())) == set()


def test_namespaces_are_told_apart_when_asked_for() -> None:
    """The same port in two namespaces is one series, or two."""
    connections = [Connection(netns=OWN_NETNS)] * 3 + [Connection(netns=OTHER_NETNS)] * 5
    together = counted(connections, selection())
    assert together.established.tolist() == [8]
    apart = counted(connections, replace(selection(), by_netns=True))
    by_netns = dict(
        zip(apart.series.view(SERIES)["netns"].tolist(), apart.established, strict=True)
    )
    assert by_netns == {OWN_NETNS: 3, OTHER_NETNS: 5}


def test_a_connection_is_long_term_from_the_boundary_on() -> None:
    """Established at the boundary is long-term, a nanosecond later is not yet."""
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
def test_before_boot_nothing_was_established(since_ns: int, expected: int) -> None:
    """A host that is up for less than the duration has no long-term connection."""
    counts = counted([Connection(established_ns=0)] * 3, selection(), since_ns)
    assert counts.long_term.sum() == expected
    assert counts.established.sum() == 3


def test_no_chunks_are_no_connections() -> None:
    """No chunk, or one with nothing in it, counts 0."""
    for chunks in ([], [records([])]):
        counts = count(chunks, selection(), 0)
        assert counts.total == counts.established.sum() == counts.long_term.sum() == 0


def test_a_chunk_is_done_with_before_the_next() -> None:
    """A source may use one buffer again and again."""

    def one_buffer() -> Iterator[Records]:
        buffer = np.zeros(3, CONNECTION)
        for port, times in ((80, 3), (443, 2)):
            buffer[:times] = records([Connection(port)] * times)
            yield buffer[:times]
            buffer["key"]["local_port"] = 1

    counts = count(one_buffer(), selection(), 0)
    assert established(counts) == {(80, 4): 3, (443, 4): 2}


# Few values, and neighbours of what is compared.
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
    """Any connections in any chunks, under any selection, are counted one by one."""
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


class Place(NamedTuple):
    """A series, in the order in which they are sorted."""

    netns: int
    port: int
    version: int = 4


def places(series: Series) -> list[Place]:
    return [
        Place(netns, port, version) for version, port, netns in series.view(SERIES).tolist()
    ]


def series_of(chosen: Iterable[Place]) -> Series:
    rows = [(version, port, netns) for netns, port, version in sorted(set(chosen))]
    return np.array(rows, SERIES).view(np.uint64)


def ports_in(*ports: int, netns: int = 0) -> list[Place]:
    return [Place(netns, port) for port in ports]


def counts_of(numbers: dict[Place, int]) -> Counts:
    """So many established connections of each, a third of them long-term."""
    established = np.array([numbers[each] for each in sorted(numbers)], np.int64)
    return Counts(series_of(numbers), established, established // 3, 1009)


def folded(
    numbers: dict[Place, int],
    max_series: int,
    *,
    listening: Iterable[Place] = (),
    named: Iterable[Place] = (),
    published: Iterable[Place] = (),
) -> tuple[dict[Place, int], int]:
    """The established connections of each series on a page, and how many are not on it."""
    page, number = fold(
        counts_of(numbers),
        listening=series_of(listening),
        named=series_of(named),
        published=series_of(published),
        max_series=max_series,
    )
    return dict(zip(places(page.series), page.established.tolist(), strict=True)), number


OTHER = Place(0, 0)


def test_what_fits_is_not_folded() -> None:
    """As many series as there may be are all there, and no other is."""
    numbers = dict(zip(ports_in(22, 443), (3, 5), strict=True))
    shown = folded(numbers, 5, listening=ports_in(22, 80), published=ports_in(8080, 8443))
    assert shown == ({**numbers, **dict.fromkeys(ports_in(80, 8080, 8443), 0)}, 0)


def test_the_smallest_are_folded() -> None:
    """Those with the fewest connections are one series, of each IP version."""
    numbers = {
        Place(0, 22): 2,
        Place(0, 22, 6): 3,
        Place(0, 80): 7,
        Place(0, 443): 5,
        Place(0, 443, 6): 11,
        Place(0, 8443): 1,
    }
    assert folded(numbers, 3) == (
        {
            OTHER: 3,
            Place(0, 0, 6): 3,
            Place(0, 80): 7,
            Place(0, 443): 5,
            Place(0, 443, 6): 11,
        },
        3,
    )


def test_a_listener_is_worth_a_connection() -> None:
    """At 0 it stays before an ephemeral port's one connection, but not before two."""
    numbers = dict(zip(ports_in(443, 50021, 50023), (2, 1, 1), strict=True))
    (listener,) = ports_in(60013)
    assert folded(numbers, 2, listening=[listener]) == (
        {OTHER: 2, Place(0, 443): 2, listener: 0},
        2,
    )
    (busy,) = ports_in(50021)
    assert folded({**numbers, busy: 3}, 2, listening=[listener])[0].keys() == {
        OTHER,
        Place(0, 443),
        busy,
    }


def test_among_equals_what_is_published_stays() -> None:
    """A newcomer that is no larger displaces nothing, not even one of a higher port."""
    listening = ports_in(22, 80, 443, 8443)
    shown, number = folded({}, 2, listening=listening, published=ports_in(443, 8443))
    assert shown == dict.fromkeys([OTHER, *ports_in(443, 8443)], 0)
    assert number == 2
    assert folded({}, 2, listening=listening)[0].keys() == {OTHER, *ports_in(22, 80)}


def test_what_is_over_is_forgotten_and_not_folded() -> None:
    """A port merely seen once makes room for one that is used, and leaves no trace."""
    shown = folded({Place(0, 443): 3}, 2, published=ports_in(22, 80))
    assert shown == ({Place(0, 22): 0, Place(0, 443): 3}, 0)


def test_named_ports_are_never_folded() -> None:
    """However many there are, and however small; they use up the room of others."""
    named_ports = ports_in(22, 80, 443)
    numbers = dict(zip(ports_in(443, 5432, 8443), (1, 13, 17), strict=True))
    shown = folded(numbers, 2, named=named_ports)
    kept = {**dict.fromkeys(named_ports, 0), Place(0, 443): 1}
    assert shown == ({OTHER: 30, **kept}, 2)
    shown = folded(numbers, 4, named=named_ports)
    assert shown == ({OTHER: 13, **kept, Place(0, 8443): 17}, 1)


def test_other_stays_once_it_is_there() -> None:
    """When nothing is folded any more it is 0, and takes no room of a port."""
    shown = folded({Place(0, 443): 3}, 1, published=[OTHER, Place(0, 443)])
    assert shown == ({OTHER: 0, Place(0, 443): 3}, 0)


def test_each_namespace_has_an_other_of_its_own() -> None:
    """What is folded is told apart by namespace and IP version."""
    largest = {Place(7, 443): 13, Place(7, 8443): 11}
    numbers = {**largest, Place(7, 22): 1, Place(7, 80): 2, Place(11, 22, 6): 5}
    others = {Place(7, 0): 3, Place(11, 0, 6): 5}
    assert folded(numbers, 2) == ({**largest, **others}, 3)


def test_namespaces_do_not_get_around_the_bound() -> None:
    """Of more namespaces than series may be, the rest have one other together."""
    numbers = {Place(netns, 443): 1 for netns in range(101, 101 + 31)}
    shown, number = folded(numbers, 5, published=[Place(129, 0)])
    assert number == 31 - 5
    assert {each for each in shown if each.port} == {*list(numbers)[:5]}
    assert {each.netns: shown[each] for each in shown if not each.port} == {
        0: 31 - 5 - 5,
        **dict.fromkeys([106, 107, 108, 109, 129], 1),
    }


some_places = st.builds(
    Place,
    netns=st.sampled_from([0, 7, 11, 2**32 - 1]),
    port=st.sampled_from([1, 2, 80, 443, PORTS - 1]),
    version=st.sampled_from([4, 6]),
)
some_others = st.builds(
    Place,
    netns=st.sampled_from([0, 7, 11]),
    port=st.just(0),
    version=st.sampled_from([4, 6]),
)


@settings(deadline=None)
@given(
    numbers=st.dictionaries(some_places, st.sampled_from([1, 2, 3, 5, 2**40]), max_size=31),
    listening=st.sets(some_places),
    named_places=st.sets(some_places, max_size=5),
    published=st.sets(some_places | some_others),
    max_series=st.integers(1, 31),
)
def test_folding_loses_nothing(
    *,
    numbers: dict[Place, int],
    listening: set[Place],
    named_places: set[Place],
    published: set[Place],
    max_series: int,
) -> None:
    """Sums are those before, the bound holds, the largest stay, and the page is stable."""
    counts = counts_of(numbers)
    given_series = {"listening": series_of(listening), "named": series_of(named_places)}
    page, number = fold(
        counts, **given_series, published=series_of(published), max_series=max_series
    )
    assert page.total == counts.total
    for version in (4, 6):
        was, is_now = (each.series.view(SERIES)["ip_version"] for each in (counts, page))
        for before, now in (
            (counts.established, page.established),
            (counts.long_term, page.long_term),
        ):
            assert now[is_now == version].sum() == before[was == version].sum()
    assert (np.diff(page.series.astype(object)) > 0).all()
    kept = {each for each in places(page.series) if each.port}
    used = {*numbers, *listening, *named_places}
    assert named_places <= kept
    assert len(kept) <= max(max_series, len(named_places))
    assert len(page.series) - len(kept) <= max_series + 2
    assert number == len(used - kept)
    if number:
        assert len(kept) == max(max_series, len(named_places))

    def worth(place: Place) -> tuple[int, bool, bool]:
        is_listened = place in listening
        return numbers.get(place, 0) + is_listened, is_listened, place in published

    smallest = min(map(worth, kept - named_places), default=None)
    assert smallest is None or all(worth(each) <= smallest for each in used - kept)
    again, _ = fold(counts, **given_series, published=page.series, max_series=max_series)
    assert again.series.tolist() == page.series.tolist()
    assert again.established.tolist() == page.established.tolist()


@settings(deadline=None)
@given(
    connections=some_connections, seed=st.integers(0, 2**32), max_series=st.integers(1, 7)
)
def test_the_order_of_connections_does_not_matter(
    connections: list[Connection], seed: int, max_series: int
) -> None:
    """A page is the same in whatever order the kernel tells of connections."""
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
