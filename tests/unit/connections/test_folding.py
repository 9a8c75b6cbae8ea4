# SPDX-License-Identifier: GPL-3.0-only
"""Limits of the number of series: the sums stay, and the largest series are kept."""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.counting import Counts, Values
from tcpexporter.connections.folding import Folder
from tcpexporter.connections.parts import OWNER_LABELS, PORTS, Direction
from tcpexporter.connections.selection import Selection, folding_steps
from tcpexporter.connections.series import FOLDED, SERIES, Series
from tests.unit.connections.test_counting import (
    BOTH,
    Connection,
    counted,
    selection,
    some_connections,
    some_labels,
    totals,
    values_of,
)
from tests.unit.series_rows import rows_of, series_of_rows

PER_NETNS = selection(labels=("port", "tcp_version", "netns"))


class SeriesKey(NamedTuple):
    """A series; its fields have the order in which series are sorted.

    Port 0 is that of a folded series.
    """

    netns: int
    port: int
    version: int = 4


def keys_of(series: Series) -> list[SeriesKey]:
    return [SeriesKey(netns, port, version) for version, _, port, netns in rows_of(series)]


def series_of(chosen: Iterable[SeriesKey]) -> Series:
    rows = [
        (version, 0 if port else FOLDED, port, netns)
        for netns, port, version in sorted(set(chosen))
    ]
    return series_of_rows(rows)


def ports_in(*ports: int, netns: int = 0) -> list[SeriesKey]:
    return [SeriesKey(netns, port) for port in ports]


def counts_of(numbers: dict[SeriesKey, int]) -> Counts:
    """Return counts with these numbers of connections, a third of them long-term."""
    established = np.array([numbers[each] for each in sorted(numbers)], np.int64)
    values = Values(
        established,
        ages=(established // 3)[:, np.newaxis],
        ages_sum=established * 2,
        opened=established * 3,
        closed=established * 5,
        failed=established * 7,
        pre_existing=established * 11,
        lifetimes_sum=established * 13,
        lifetimes=np.outer(established, [17, 19, 23]),
    )
    return Counts(series_of(numbers), values, 1009, np.arange(len(numbers)))


def folded(
    numbers: dict[SeriesKey, int],
    max_series: int,
    *,
    listening: Iterable[SeriesKey] = (),
    named: Iterable[SeriesKey] = (),
    published: Iterable[SeriesKey] = (),
) -> tuple[dict[SeriesKey, int], int]:
    """Return the connections of each exposed series, and the number of folded series."""
    exposed, number = Folder().fold(
        counts_of(numbers),
        listening=series_of(listening),
        named=series_of(named),
        published=series_of(published),
        max_series=max_series,
        selection=PER_NETNS,
    )
    established = exposed.values.established.tolist()
    return dict(zip(keys_of(exposed.series), established, strict=True)), number


OTHER = SeriesKey(0, 0)
"""The series that contains folded ones."""


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
    exposed, number = Folder().fold(
        counts,
        **given_series,
        published=series_of(published),
        max_series=max_series,
        selection=PER_NETNS,
    )
    assert exposed.total == counts.total
    for version in (4, 6):
        was, is_now = (each.series.view(SERIES)["ip_version"] for each in (counts, exposed))
        for before, now in [
            (getattr(counts.values, each.name), getattr(exposed.values, each.name))
            for each in fields(Values)
        ]:
            assert now[is_now == version].sum() == before[was == version].sum()
    assert (exposed.series[1:] > exposed.series[:-1]).all()
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
    again, _ = Folder().fold(
        counts,
        **given_series,
        published=exposed.series,
        max_series=max_series,
        selection=PER_NETNS,
    )
    assert_equal(again, exposed)


def assert_equal(some: Counts, others: Counts) -> None:
    assert some.series.tolist() == others.series.tolist()
    for each in fields(Values):
        values = (getattr(counts.values, each.name).tolist() for counts in (some, others))
        assert next(values) == next(values)


@given(
    connections=some_connections, seed=st.integers(0, 2**32), max_series=st.integers(1, 7)
)
def test_the_order_of_connections_does_not_change_the_counts(
    connections: list[Connection], seed: int, max_series: int
) -> None:
    """The folded counts are equal for any order of the same connections."""
    selected = selection(directions=BOTH, labels=PER_NETNS.labels)
    shuffled = random.Random(seed).sample(connections, len(connections))  # noqa: S311
    nothing = series_of([])
    first, second = (
        Folder().fold(
            counted(each, selected, 100 << 13),
            listening=nothing,
            named=nothing,
            published=nothing,
            max_series=max_series,
            selection=selected,
        )
        for each in (connections, shuffled)
    )
    assert first[1] == second[1]
    assert_equal(first[0], second[0])


@given(
    scrapes=st.lists(some_connections, min_size=1, max_size=4),
    labels=some_labels,
    directions=st.sampled_from([(Direction.INBOUND,), (Direction.OUTBOUND,), BOTH]),
    capacity=st.sampled_from([1, 3, 1009]),
    max_series=st.integers(1, 7),
)
def test_folding_keeps_the_sums_for_any_labels(
    *,
    scrapes: list[list[Connection]],
    labels: tuple[str, ...],
    directions: Sequence[Direction],
    capacity: int,
    max_series: int,
) -> None:
    """In each scrape the limit holds, and no two series have the same label values.

    This holds as well if the source has capacity for a few series only, so that it has
    already added up others.
    """
    selected = selection(directions=directions, labels=labels)
    published = series_of([])
    for connections in scrapes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tcpexporter.connections.memory_ledger.CAPACITY", capacity)
            counts = counted(connections, selected, 100 << 13, 0)
        exposed, number = Folder().fold(
            counts,
            listening=series_of([]),
            named=series_of([]),
            published=published,
            max_series=max_series,
            selection=selected,
        )
        published = exposed.series
        assert totals(exposed.values) == totals(counts.values)
        rows = values_of(exposed, selected)
        assert len(set(rows)) == len(rows)
        other = {"port", "remote_port", "netns", *OWNER_LABELS} & {*labels}
        separate = [row for row in rows if "other" not in row]
        if other:
            without_port = [
                row
                for row in separate
                if not {*labels} & {"port", "remote_port"}
                or any(
                    value
                    for name, value in zip(labels, row, strict=True)
                    if name in ("port", "remote_port")
                )
            ]
            assert len(without_port) <= max_series
        else:
            assert number == 0
            assert len(rows) == len(separate)
        assert bool(number) <= any("other" in row for row in rows)


def test_nothing_is_folded_without_a_label_that_has_many_values() -> None:
    """IP version and direction have two values each."""
    connections = [
        Connection(version=version, direction=direction)
        for version in (4, 6)
        for direction in Direction
    ]
    selected = selection(directions=BOTH, labels=("tcp_version", "direction"))
    nothing = series_of([])
    exposed, number = Folder().fold(
        counted(connections, selected),
        listening=nothing,
        named=nothing,
        published=nothing,
        max_series=1,
        selection=selected,
    )
    assert folding_steps(selected) == []
    assert number == 0
    assert exposed.values.established.tolist() == [1, 1, 1, 1]


def folded_rows(
    connections: Sequence[Connection], selected: Selection, published: Series, most: int
) -> tuple[dict[tuple[str, ...], int], Series]:
    """Fold; return the connections by label values, and the series."""
    exposed, _ = Folder().fold(
        counted(connections, selected),
        listening=series_of([]),
        named=series_of([]),
        published=published,
        max_series=most,
        selection=selected,
    )
    rows = values_of(exposed, selected)
    assert len(set(rows)) == len(rows)
    return dict(zip(rows, exposed.values.established.tolist(), strict=True)), exposed.series


def test_remote_ports_are_folded_apart_from_local_ones() -> None:
    """Each of the two labels has the value other in a series of its own."""
    selected = selection(directions=BOTH, labels=("port", "remote_port"))
    connections = [
        *[Connection(port) for port in (22, 80, 443, 443)],
        *[
            Connection(40001, direction=Direction.OUTBOUND, remote_port=port)
            for port in (5432, 5432, 5432, 6379, 11211)
        ],
    ]
    assert folded_rows(connections, selected, series_of([]), 2)[0] == {
        ("443", ""): 2,
        ("other", ""): 2,
        ("", "5432"): 3,
        ("", "other"): 2,
    }


def test_a_series_without_port_is_not_folded_by_port() -> None:
    """With the label remote_port alone, all inbound connections are one series.

    It has the label values that the folded series would have.
    """
    selected = selection(directions=BOTH, labels=("remote_port",))
    outbound = [
        Connection(direction=Direction.OUTBOUND, remote_port=port)
        for port in (5432, 5432, 5432, 6379, 6379)
    ]
    first, published = folded_rows([Connection(), *outbound], selected, series_of([]), 1)
    assert first == {("",): 1, ("5432",): 3, ("other",): 2}
    second, _ = folded_rows([Connection()] * 7 + outbound, selected, published, 1)
    assert second == {("",): 7, ("other",): 5}


SETS_OF_PORTS = ((), (80, 443), (22, 80, 443), (22, 5432, 8443))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, len(SETS_OF_PORTS) - 1)), max_size=17
    ),
    st.integers(1, 7),
)
def test_a_folder_returns_what_a_new_one_returns(
    changes: list[tuple[int, int]], max_series: int
) -> None:
    """Each exposition is that of a new folder, for any sequence of scrapes.

    A change sets the ports with connections, with listeners, or of --port. Three scrapes
    follow each change. A source returns the same arrays while nothing changes.
    """
    sets = [counts_of(dict.fromkeys(ports_in(*each), 3)) for each in SETS_OF_PORTS]
    series = [each.series for each in sets]
    folder, published = Folder(), series[0]
    chosen = [0, 0, 0]
    for changed, to in itertools.chain.from_iterable(zip(*[changes] * 3, strict=True)):
        chosen[changed] = to
        opened, listening, named = chosen
        arrays = {
            "listening": series[listening],
            "named": series[named],
            "published": published,
        }
        page, left_out = folder.fold(
            sets[opened], **arrays, max_series=max_series, selection=PER_NETNS
        )
        expected, expected_left_out = Folder().fold(
            sets[opened], **arrays, max_series=max_series, selection=PER_NETNS
        )
        assert left_out == expected_left_out
        assert page.series.tolist() == expected.series.tolist()
        for each in fields(page.values):
            found = getattr(page.values, each.name)
            assert np.array_equal(found, getattr(expected.values, each.name)), each.name
        published = page.series


def test_the_series_that_are_left_out_depend_on_the_counts_of_each_scrape() -> None:
    """Both scrapes have the same arrays as arguments, and other ports are the largest."""
    folder = Folder()
    counts = counts_of(dict(zip(ports_in(80, 443), (3, 5), strict=True)))
    nothing = series_of([])
    for largest in (443, 80):
        page, left_out = folder.fold(
            counts,
            listening=nothing,
            named=nothing,
            published=nothing,
            max_series=1,
            selection=PER_NETNS,
        )
        assert left_out == 1
        assert [each.port for each in keys_of(page.series)] == [0, largest]
        counts.values.established[:] = counts.values.established[::-1].copy()
