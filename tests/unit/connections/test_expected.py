# SPDX-License-Identifier: GPL-3.0-only
"""Counts of the connections that rules expect, compared with a slow count in Python."""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.expected import ANY, End, Network, Rule
from tcpexporter.connections.matching import PIECE, Found, count_expected
from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import CLOSED, CONNECTION, SOCKET, Records, Words, words
from tcpexporter.connections.slot_counts import first_young
from tests import rule_oracle as oracle
from tests.rule_oracle import Connection, connection

SECOND_NS = 10**9
LIMIT = first_young(100 * SECOND_NS)


def nobody(_unit: str) -> npt.NDArray[np.bool_]:
    return np.zeros(0, np.bool_)


def words_of(number: int, *, age_s: int = 60, series: int = 1) -> Words:
    established_ns = np.full(number, (100 - age_s + 60) * SECOND_NS, np.uint64)
    return words(np.full(number, series, np.uint32), established_ns)


def found(
    rules: Sequence[Rule], connections: Sequence[Connection], dtype: "np.dtype[np.void]"
) -> list[int]:
    made = oracle.records(connections)
    window = np.zeros(len(made), dtype)
    for name in ("key", "is_outbound"):
        window[name] = made[name]
    counted = count_expected([(window, words_of(len(made)))], rules, LIMIT, nobody)
    return [int(each) for each in counted.established]


def rule(remote: str = "", local: str = "", direction: Direction | None = None) -> Rule:
    return Rule("x", "x", end(remote), end(local), direction=direction)


def end(text: str) -> End:
    """Parse an end: a network, a space, and a port or a range; either may be missing."""
    network, _, ports = text.partition(" ")
    first, _, last = (ports or "0-65535").partition("-")
    return End(ip_network(network) if network else None, int(first), int(last or first))


CASES = [
    # A rule, what matches it, and what does not.
    (
        rule(remote="192.0.2.10 5432"),
        [connection("192.0.2.1:40000", "192.0.2.10:5432", 1)],
        [
            connection("192.0.2.1:40000", "192.0.2.10:5433", 1),
            connection("192.0.2.1:40000", "192.0.2.11:5432", 1),
            connection("192.0.2.10:5432", "192.0.2.1:40000"),
            connection("[2001:db8::1]:40000", "[::192.0.2.10]:5432"),
        ],
    ),
    (
        rule(local=" 80-443"),
        [connection("[::1]:80", "[::1]:1"), connection("127.0.0.1:443", "127.0.0.1:1")],
        [connection("[::1]:79", "[::1]:443"), connection("127.0.0.1:444", "127.0.0.1:1")],
    ),
    (
        rule(remote="0.0.0.0/0"),
        [
            connection("192.0.2.1:1", "192.0.2.2:1"),
            # an IPv4 client of a dual-stack socket
            connection("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:1"),
        ],
        [connection("[::1]:1", "[::1]:1")],
    ),
    (
        rule(remote="::/0"),
        [connection("[::1]:1", "[2001:db8::1]:1"), connection("[::1]:1", "[::1]:1")],
        [connection("192.0.2.1:1", "192.0.2.2:1")],
    ),
    (
        rule(remote="0.0.0.0/0", local="::/0"),
        [],
        [connection("192.0.2.1:1", "192.0.2.2:1")],
    ),
    (
        rule(local="2001:db8::/33"),
        [connection("[2001:db8:7fff::1]:1", "[::1]:1")],
        [connection("[2001:db8:8000::1]:1", "[::1]:1")],
    ),
    (
        rule(remote="10.0.0.0/9", local="10.0.0.0/8 22", direction=Direction.INBOUND),
        [connection("10.255.0.1:22", "10.127.0.1:1")],
        [
            connection("10.255.0.1:22", "10.128.0.1:1"),
            connection("11.0.0.1:22", "10.127.0.1:1"),
            connection("10.255.0.1:22", "10.127.0.1:1", 1),
        ],
    ),
]


@pytest.mark.parametrize("dtype", [SOCKET, CONNECTION], ids=["sockets", "tracker"])
@pytest.mark.parametrize(("each", "matching", "others"), CASES)
def test_a_rule_counts_what_matches(
    each: Rule,
    matching: list[Connection],
    others: list[Connection],
    dtype: "np.dtype[np.void]",
) -> None:
    """The records of the tracker and those of the socket tables are counted alike."""
    assert found([each], matching, dtype) == [len(matching)]
    assert found([each], others, dtype) == [0]


ADDRESSES: list[oracle.Address] = [
    *map(
        IPv4Address, ("0.0.0.0", "10.0.0.1", "10.128.0.1", "192.0.2.1", "255.255.255.255")
    ),
    *map(IPv6Address, ("::", "::1", "::a00:1", "2001:db8::1", "2001:db8:8000::1")),
    IPv6Address((1 << 128) - 1),
]
PORTS = st.sampled_from([1, 2, 79, 80, 443, 5432, 65534, 65535])
DIRECTIONS = st.sampled_from(list(Direction))


@st.composite
def connections(draw: st.DrawFn) -> Connection:
    local = draw(st.sampled_from(ADDRESSES))
    same = [each for each in ADDRESSES if each.version == local.version]
    remote = draw(st.sampled_from(same))
    return Connection(local, draw(PORTS), remote, draw(PORTS), draw(DIRECTIONS))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    address = draw(st.sampled_from(ADDRESSES))
    bits = draw(st.just(0) | st.integers(0, address.max_prefixlen))
    network: Network = ip_network((address, bits), strict=False)
    return network


@st.composite
def ends(draw: st.DrawFn) -> End:
    ports = draw(st.sampled_from([(0, 65535), (1, 65535), (80, 80), (79, 443)]))
    return End(draw(st.none() | networks()), *ports)


RULES = st.builds(
    Rule, st.just("x"), st.just("x"), ends(), ends(), direction=st.none() | DIRECTIONS
)


@given(st.lists(RULES, max_size=5), st.lists(connections(), max_size=50))
def test_the_counts_are_those_of_a_slow_count(
    rules: list[Rule], opened: list[Connection]
) -> None:
    """The slow count compares each connection with each rule, in plain Python."""
    expected = [sum(oracle.matches(each, one) for one in opened) for each in rules]
    assert found(rules, opened, CONNECTION) == expected


def counted(*windows: tuple[Records, Words], rules: Sequence[Rule] = ()) -> Found:
    return count_expected(windows, rules or [rule(local=" 443")], LIMIT, nobody)


def at_443(number: int) -> Records:
    return oracle.records([connection("192.0.2.1:443", "192.0.2.2:50021")] * number)


def test_windows_of_any_size_are_added_up() -> None:
    """Some are larger than the pieces that are matched at once."""
    windows = [(at_443(size), words_of(size)) for size in (1, 0, 2 * PIECE + 3, 7)]
    assert counted(*windows).established.tolist() == [2 * PIECE + 11]


def test_long_term_connections_are_those_established_before_a_time() -> None:
    """Young ones are established, but not long-term."""
    windows = [(at_443(3), words_of(3, age_s=60)), (at_443(5), words_of(5, age_s=59))]
    result = counted(*windows)
    assert (result.established.tolist(), result.long_term.tolist()) == ([8], [3])


def test_slots_without_a_connection_are_not_counted() -> None:
    """Slots that were never used and those that were closed keep old records."""
    slots = words_of(5)
    slots[1], slots[3] = 0, CLOSED
    assert counted((at_443(5), slots)).established.tolist() == [3]


class Reopened:
    """Slots; another connection opens in one of them while a column is copied."""

    def __init__(self, records: Records, slots: Words) -> None:
        self._records, self._slots = records, slots

    def __getitem__(self, key: str | slice) -> "Reopened | npt.NDArray[np.void]":
        if isinstance(key, slice):
            return self
        self._slots[1] += np.uint64(1 << 18)
        copied: npt.NDArray[np.void] = self._records[key]
        return copied


def test_a_slot_that_changes_while_it_is_read_is_left_out() -> None:
    """Its record may be that of another connection."""
    slots = words_of(5)
    window: Records = Reopened(at_443(5), slots)  # type: ignore[assignment]
    assert counted((window, slots)).established.tolist() == [4]


def test_a_unit_owns_the_connections_of_its_series() -> None:
    """A series that is newer than the list of units has no owner yet."""
    every = Rule("x", "x", end(""), end(" 443"), unit="a.service")
    other = Rule("y", "y", unit="b.service")
    units = {"a.service": [False, True, False, True], "b.service": [False, False, True]}

    def of_unit(unit: str) -> npt.NDArray[np.bool_]:
        return np.array(units[unit])

    slots = np.concatenate([words_of(3, series=each) for each in (1, 2, 3, 4, 9)])
    window = (at_443(len(slots)), slots)
    result = count_expected([window], [every, other], LIMIT, of_unit)
    assert result.established.tolist() == [6, 3]


def test_without_connections_each_count_is_0() -> None:
    """The metrics of a rule always exist."""
    assert counted(rules=[rule(), Rule("y", "y", ANY)]).established.tolist() == [0, 0]


def iterated(windows: Sequence[tuple[Records, Words]]) -> Iterator[tuple[Records, Words]]:
    """Yield windows that are valid only until the next one is requested."""
    for records, slots in windows:
        yield records, slots
        records["key"]["local_port"] = 1
        slots[:] = 0


def test_a_window_is_used_only_until_the_next_one() -> None:
    """The tracker maps the records of a window only until then."""
    windows = [(at_443(each), words_of(each)) for each in (3, 5)]
    result = count_expected(iterated(windows), [rule(local=" 443")], LIMIT, nobody)
    assert result.established.tolist() == [8]
