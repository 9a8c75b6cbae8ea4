# SPDX-License-Identifier: GPL-3.0-only
"""The ledger in memory: numbers of series, and what has happened in each."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import SERIES_FIRST, TIME_SHIFT, OutboundPort, Parts
from tcpexporter.connections.record import Words, numbers, times_ns
from tcpexporter.connections.series import (
    FOLDED,
    NO_SERIES,
    OUTBOUND,
    SERIES,
    series_of,
)
from tests.unit.connections.test_counting import (
    BOTH,
    LATEST_NS,
    OTHER_NETNS,
    OWN_NETNS,
    Connection,
    records,
    some_connections,
)
from tests.unit.series_rows import rows_of

PARTS = Parts(OutboundPort.REMOTE, by_netns=True)
SECOND_NS = 10**9


MODULE_CAPACITY = "tcpexporter.connections.memory_ledger.CAPACITY"


def test_without_connections_there_are_the_folded_series_only() -> None:
    """Their numbers are those of the BPF program, and number 0 has no series."""
    ledger = MemoryLedger(PARTS)
    assert numbers(ledger.count(records([])).words).tolist() == []
    assert rows_of(ledger.snapshot().series) == [
        (0, 0, 0, 0),
        (4, FOLDED, 0, 0),
        (6, FOLDED, 0, 0),
        (4, FOLDED | OUTBOUND, 0, 0),
        (6, FOLDED | OUTBOUND, 0, 0),
    ]


@given(polls=st.lists(some_connections, max_size=4))
def test_a_series_has_one_number_and_keeps_it(polls: list[list[Connection]]) -> None:
    """The number leads to the series of the connection, in each later poll too."""
    ledger = MemoryLedger(PARTS)
    before = ledger.snapshot().series
    for each in polls:
        made = records(each)
        found = ledger.count(made).words
        series = ledger.snapshot().series
        assert series[numbers(found)].tolist() == series_of(made, PARTS).tolist()
        assert (times_ns(found) == made["established_ns"] >> 13 << 13).all()
        assert len(set(series.tolist())) == len(series)
        assert series[: len(before)].tolist() == before.tolist()
        before = series


def test_beyond_the_capacity_series_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one number for each IP version and direction; known series keep theirs."""
    monkeypatch.setattr(MODULE_CAPACITY, 2)
    ledger = MemoryLedger(PARTS)
    known = records([Connection(443), Connection(443, 6)])
    assert sorted(numbers(ledger.count(known).words)) == [SERIES_FIRST, SERIES_FIRST + 1]
    more = [
        Connection(port, version, direction, remote_port=port)
        for port in (22, 80)
        for version in (4, 6)
        for direction in BOTH
    ]
    expected = [1 + (each.version == 6) + 2 * (each.direction == BOTH[1]) for each in more]
    assert numbers(ledger.count(records(more)).words).tolist() == expected
    assert sorted(numbers(ledger.count(known).words)) == [SERIES_FIRST, SERIES_FIRST + 1]
    assert len(ledger.snapshot().series) == SERIES_FIRST + 2


def test_the_capacity_is_used_up_before_series_are_folded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A poll that finds more series than there are free numbers uses all of these."""
    monkeypatch.setattr(MODULE_CAPACITY, 7)
    ledger = MemoryLedger(PARTS)
    found = numbers(
        ledger.count(records([Connection(port) for port in range(1, 12)])).words
    )
    assert Counter(found.tolist()) == {
        1: 4,
        **dict.fromkeys(range(SERIES_FIRST, SERIES_FIRST + 7), 1),
    }


@given(
    steps=st.lists(
        st.tuples(some_connections, st.sampled_from(["pre_existing", "opened", "closed"])),
        max_size=5,
    ),
    capacity=st.sampled_from([1, 3, 1009]),
)
def test_what_happens_is_added_up_in_each_series(
    steps: list[tuple[list[Connection], str]], capacity: int
) -> None:
    """The numbers are those of a Python loop."""
    expected: Counter[tuple[str, int]] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE_CAPACITY, capacity)
        ledger = MemoryLedger(PARTS)
        for connections, what in steps:
            found = ledger.count(records(connections)).words
            if what == "pre_existing":
                ledger.record_pre_existing(found)
            elif what == "opened":
                ledger.record_opened(found)
            else:
                ledger.record_closed(found, LATEST_NS)
            expected.update((what, number) for number in numbers(found).tolist())
    shot = ledger.snapshot()
    for what in ("pre_existing", "opened", "closed"):
        rows = getattr(shot, what).tolist()
        assert {(what, at): number for at, number in enumerate(rows) if number} == {
            key: number for key, number in expected.items() if key[0] == what
        }
    assert not shot.failed.any()
    assert not shot.lifetimes_sum.any()
    assert shot.lifetimes.shape == (len(shot.series), 0)


def closed_after(lifetime_units: Sequence[int], now_ns: int) -> list[Connection]:
    """Return connections that close now, with these lifetimes in units of 2^13 ns."""
    now = now_ns >> TIME_SHIFT
    return [Connection(established_ns=now - each << TIME_SHIFT) for each in lifetime_units]


def test_a_lifetime_is_in_the_first_bucket_that_is_not_too_small() -> None:
    """The bucket of a bound has the lifetimes up to it; the last one has the others."""
    bounds_s = (1.0, 6.0)
    one, six = (round(each * SECOND_NS) >> TIME_SHIFT for each in bounds_s)
    lifetimes = [0, 1, one - 1, one, one + 1, six, six, six + 1, 9 * six, 9 * six, 99 * six]
    ledger = MemoryLedger(PARTS, bounds_s)
    found = ledger.count(records(closed_after(lifetimes, LATEST_NS))).words
    ledger.record_closed(found, LATEST_NS)
    shot = ledger.snapshot()
    assert shot.lifetimes[SERIES_FIRST].tolist() == [4, 3, 4]
    assert shot.lifetimes_sum[SERIES_FIRST] == sum(lifetimes)
    assert shot.lifetimes.sum(axis=1).tolist() == shot.closed.tolist()


def test_a_connection_with_a_time_in_the_future_has_lifetime_0() -> None:
    """A restored age may be wrong; a sum must not decrease."""
    ledger = MemoryLedger(PARTS, (1.0,))
    found = ledger.count(records([Connection(established_ns=LATEST_NS)] * 3)).words
    ledger.record_closed(found, SECOND_NS)
    shot = ledger.snapshot()
    assert shot.lifetimes_sum[SERIES_FIRST] == 0
    assert shot.lifetimes[SERIES_FIRST].tolist() == [3, 0]


def test_a_snapshot_does_not_change() -> None:
    """The polling thread records while a scrape uses the snapshot."""
    ledger = MemoryLedger(PARTS, (1.0,))
    found = ledger.count(records([Connection()] * 3)).words
    before = ledger.snapshot()
    ledger.record_opened(found)
    ledger.record_closed(found, LATEST_NS)
    ledger.record_pre_existing(found)
    ledger.forget("netns", [OWN_NETNS])
    ledger.drop_forgotten(found[:0])
    ledger.count(records([Connection(80)]))
    assert before.series[SERIES_FIRST] == series_of(records([Connection()]), PARTS)[0]
    for each in (before.opened, before.closed, before.pre_existing, before.lifetimes):
        assert not each.any()


def series_in(ledger: MemoryLedger) -> set[tuple[int, int]]:
    """Return namespace and port of each series that is not folded."""
    parts = ledger.snapshot().series[SERIES_FIRST:].view(SERIES)
    return {(each["netns"], each["port"]) for each in parts if each["ip_version"]}


def test_series_of_forgotten_namespaces_lose_their_counters() -> None:
    """Series with a connection, and those of other namespaces, keep theirs."""
    ledger = MemoryLedger(PARTS)
    made = records(
        [
            Connection(22, netns=OTHER_NETNS),
            Connection(80, netns=OTHER_NETNS),
            Connection(443, netns=OWN_NETNS),
        ]
    )
    found = ledger.count(made).words
    ledger.record_opened(found)
    ledger.record_closed(found[[0, 2]], LATEST_NS)
    ledger.forget("netns", [OTHER_NETNS])
    assert len(series_in(ledger)) == 3
    ledger.drop_forgotten(found[1:2])
    assert series_in(ledger) == {(OTHER_NETNS, 80), (OWN_NETNS, 443)}
    again = ledger.count(made).words
    shot = ledger.snapshot()
    assert shot.opened[numbers(again)].tolist() == [0, 1, 1]
    assert shot.closed[numbers(again)].tolist() == [0, 0, 1]


def test_a_namespace_is_forgotten_once() -> None:
    """A new namespace with the same inode keeps what happens in it."""
    ledger = MemoryLedger(PARTS)
    ledger.forget("netns", [OWN_NETNS])
    ledger.drop_forgotten(ledger.count(records([])).words)
    ledger.record_opened(ledger.count(records([Connection()])).words)
    ledger.drop_forgotten(ledger.count(records([])).words)
    assert series_in(ledger) == {(OWN_NETNS, 443)}


def test_other_series_keep_their_numbers_when_some_are_forgotten() -> None:
    """A scrape may have the words from before, and the ledger from after."""
    ledger = MemoryLedger(PARTS)
    gone = ledger.count(records([Connection(22, netns=OTHER_NETNS)])).words
    kept = ledger.count(records([Connection(443)])).words
    ledger.forget("netns", [OTHER_NETNS])
    ledger.drop_forgotten(kept)
    series = ledger.snapshot().series
    assert series[numbers(kept)].tolist() == series_of(records([Connection()]), PARTS)
    assert series[numbers(gone)].tolist() == [NO_SERIES]
    assert ledger.count(records([Connection(443)])).words.tolist() == kept.tolist()


def test_free_numbers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the ledger does not grow with the namespaces that come and go."""
    monkeypatch.setattr(MODULE_CAPACITY, 5)
    ledger = MemoryLedger(PARTS)
    stays = ledger.count(records([Connection()])).words
    for netns in range(1, 101):
        found = ledger.count(
            records([Connection(port, netns=netns) for port in (1, 2, 3)])
        ).words
        assert len(set(numbers(found).tolist()) - set(range(SERIES_FIRST))) == 3
        ledger.record_opened(found)
        ledger.record_closed(found, LATEST_NS)
        assert ledger.snapshot().opened[numbers(found)].tolist() == [1, 1, 1]
        ledger.forget("netns", [netns])
        ledger.drop_forgotten(stays)
    assert len(ledger.snapshot().series) <= SERIES_FIRST + 5
    assert ledger.snapshot().opened.sum() == 0


def test_a_word_of_a_dropped_series_is_not_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next series with the number begins at 0."""
    monkeypatch.setattr(MODULE_CAPACITY, 1)
    ledger = MemoryLedger(PARTS, (1.0,))

    def happens(netns: int) -> Words:
        found = ledger.count(records([Connection(netns=netns)] * 3)).words
        ledger.record_opened(found)
        ledger.record_closed(found, LATEST_NS)
        return found

    first = happens(7)
    ledger.forget("netns", [7])
    ledger.drop_forgotten(first[:0])
    second = happens(11)
    assert numbers(first).tolist() == numbers(second).tolist()
    shot = ledger.snapshot()
    assert shot.opened[SERIES_FIRST] == shot.closed[SERIES_FIRST] == 3
    assert shot.lifetimes[SERIES_FIRST].tolist() == [0, 3]


class LittleMemory:
    """Lets some calls of a function succeed; all later ones raise MemoryError."""

    def __init__(self, function: Callable[..., object], calls: int) -> None:
        self._function = function
        self._calls = calls

    def __call__(self, *arguments: object, **named: object) -> object:
        if not self._calls:
            raise MemoryError
        self._calls -= 1
        return self._function(*arguments, **named)


@pytest.mark.parametrize("name", ["zeros", "concatenate"])
def test_a_ledger_works_after_each_allocation_that_failed(name: str) -> None:
    """Counting fails at the first call of a numpy function, then at the second, and so on.

    Each time the next call counts. Two of the series get numbers that were freed.
    """
    function = getattr(np, name)
    stays, gone = Connection(443), [Connection(port, netns=OTHER_NETNS) for port in (1, 2)]
    more = records([stays, *(Connection(port) for port in (3, 5, 7, 11, 13))])
    for calls in itertools.count():
        ledger = MemoryLedger(PARTS)
        found = ledger.count(records([stays, *gone])).words
        ledger.record_opened(found)
        ledger.forget("netns", [OTHER_NETNS])
        ledger.drop_forgotten(found[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, name, LittleMemory(function, calls))
            try:
                ledger.count(more)
            except MemoryError:
                has_failed = True
            else:
                has_failed = False
        found = ledger.count(more).words
        ledger.record_opened(found)
        shot = ledger.snapshot()
        assert shot.series[numbers(found)].tolist() == series_of(more, PARTS).tolist()
        assert shot.opened[numbers(found)].tolist() == [2, 1, 1, 1, 1, 1]
        assert len(shot.series) == SERIES_FIRST + 6
        if not has_failed:
            break
    assert calls >= 2
