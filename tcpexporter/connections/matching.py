# SPDX-License-Identifier: GPL-3.0-only
"""Counts the connections that match rules of `expected`."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.expected import V4_MAPPED, End, Rule
from tcpexporter.connections.memory_order import memory_barrier
from tcpexporter.connections.parts import PORTS
from tcpexporter.connections.record import SERIES_MASK, Records, Words

IPV4_HALVES = np.frombuffer(V4_MAPPED.network_address.packed, np.uint64)
IPV4_MASKS = np.frombuffer(V4_MAPPED.netmask.packed, np.uint64)
"""The address and the netmask of `V4_MAPPED`, each as two words of its 16 bytes."""

EVERY_BIT = np.uint32(0xFFFFFFFF)

PIECE = 8192
"""Number of slots that are matched at once: their records fit into the cache of a CPU."""


class Found(NamedTuple):
    """How many connections match each rule; both arrays have one element for each rule."""

    established: npt.NDArray[np.int64]
    long_term: npt.NDArray[np.int64]


class _Test(NamedTuple):
    """A condition: (column & mask) - first <= span, computed in the column's dtype."""

    column: str
    first: np.generic
    span: np.generic | None = None
    """None: 0."""
    mask: np.generic | None = None
    """None: every bit."""

    def passes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return whether each value satisfies the condition."""
        if self.mask is not None:
            values = values & self.mask
        if self.span is not None:
            # Numbers below the first one wrap around, and become large.
            is_in_range: npt.NDArray[np.bool_] = values - self.first <= self.span
            return is_in_range
        is_equal: npt.NDArray[np.bool_] = values == self.first
        return is_equal


Matcher: TypeAlias = Sequence[_Test]
"""The conditions of a rule, in the order in which they are tested."""


class _Step(NamedTuple):
    """A test of a rule. Equal tests of several rules have the same number."""

    number: int
    test: _Test
    is_shared: bool
    """Whether several rules have this test."""


def matcher(rule: Rule) -> Matcher:
    """Return the conditions of a rule, without that of the unit."""
    tests = [*_tests_of("remote", rule.remote), *_tests_of("local", rule.local)]
    if rule.direction is not None:
        tests.append(_Test("is_outbound", np.uint32(rule.direction)))
    return tests


def _tests_of(side: str, end: End) -> Iterator[_Test]:
    first, span = np.uint16(end.first_port), end.last_port - end.first_port
    if span < PORTS - 1:
        yield _Test(f"{side}_port", first, np.uint16(span) if span else None)
    if end.network is None:
        return
    packed = end.network.network_address.packed, end.network.netmask.packed
    values, masks = (np.frombuffer(each, np.uint32) for each in packed)
    before = 4 - len(values)
    # Test the last word first: it differs most between addresses.
    for word in reversed(range(len(values))):
        if masks[word]:
            mask = None if masks[word] == EVERY_BIT else masks[word]
            yield _Test(f"{side}_address_{before + word}", values[word], mask=mask)
    if isinstance(end.network, IPv4Network):
        yield _Test(f"{side}_is_ipv4", np.True_)
    elif V4_MAPPED.subnet_of(end.network):
        yield _Test(f"{side}_is_ipv4", np.False_)


def count_expected(
    windows: Iterable[tuple[Records, Words]],
    rules: Sequence[Rule],
    limit: np.uint64,
    of_unit: Callable[[str], npt.NDArray[np.bool_]],
) -> Found:
    """Count the connections that match each rule.

    A connection that opens or closes meanwhile may be left out. One that is established all
    the time is counted. There is no loop over connections in Python.

    Args:
        windows: records and words of slots, which the kernel may write to at any time.
        rules: the rules.
        limit: words from this one on are those of connections that are not long-term.
        of_unit: returns, for each series number, whether a unit owns its connections.
    """
    matchers = [matcher(each) for each in rules]
    uses = Counter(test for tests in matchers for test in tests)
    numbered = {test: number for number, test in enumerate(uses)}
    steps = [
        [_Step(numbered[each], each, uses[each] > 1) for each in tests]
        for tests in matchers
    ]
    names = {test.column for test in uses}
    # The last element is for series newer than the ledger, whose owners are unknown.
    owned = {
        each: np.append(of_unit(each), np.False_)
        for each in {rule.unit for rule in rules if rule.unit}
    }
    established, long_term = np.zeros((2, len(rules)), np.int64)
    for records, words in _pieces(windows):
        before = words.copy()
        memory_barrier()
        columns = {name: _column(records, name) for name in names}
        memory_barrier()
        numbers = (before & np.uint64(SERIES_MASK)).view(np.int64)
        # A slot whose word has changed may have the record of another connection.
        is_open = (words == before) & (numbers != 0)
        if not np.count_nonzero(is_open):
            continue
        is_long_term = before < limit
        shared: dict[int, npt.NDArray[np.bool_]] = {}
        for at, (rule, rule_steps) in enumerate(zip(rules, steps, strict=True)):
            is_match = _matching(is_open, columns, rule_steps, shared)
            if rule.unit and np.count_nonzero(is_match):
                is_match = is_match & owned[rule.unit].take(numbers, mode="clip")
            found = np.count_nonzero(is_match)
            if found:
                established[at] += found
                long_term[at] += np.count_nonzero(is_match & is_long_term)
    return Found(established, long_term)


def _pieces(windows: Iterable[tuple[Records, Words]]) -> Iterator[tuple[Records, Words]]:
    for records, words in windows:
        for first in range(0, len(words), PIECE):
            piece = slice(first, first + PIECE)
            yield records[piece], words[piece]


def _column(records: Records, name: str) -> npt.NDArray[Any]:
    """Return a copy of one column of records, with one element for each record.

    Args:
        records: slots of the tracker, or connections of the socket tables.
        name: a field; or ``SIDE_address_N``, a word of 32 bits of an address; or
            ``SIDE_is_ipv4``. SIDE is local or remote.
    """
    key = records["key"]
    side, _, part = name.partition("_")
    if part == "is_ipv4":
        halves, prefix = key[f"{side}_address"].view(np.uint64), IPV4_HALVES
        is_ipv4: npt.NDArray[np.bool_] = halves[:, 0] == prefix[0]
        is_ipv4 &= halves[:, 1] & IPV4_MASKS[1] == prefix[1]
        return is_ipv4
    address, _, word = name.rpartition("_")
    if address.endswith("_address"):
        column: npt.NDArray[Any] = key[address].view(np.uint32)[:, int(word)]
    else:
        column = records[name] if name == "is_outbound" else key[name]
    return column.copy()


def _matching(
    is_open: npt.NDArray[np.bool_],
    columns: Mapping[str, npt.NDArray[Any]],
    steps: Sequence[_Step],
    shared: dict[int, npt.NDArray[np.bool_]],
) -> npt.NDArray[np.bool_]:
    """Return which slots have a connection that satisfies all tests.

    ``shared`` caches the result of each test that several rules have, by its number.
    """
    is_match = is_open
    for place, (number, test, is_shared) in enumerate(steps):
        passes = shared.get(number) if is_shared else None
        if passes is None:
            passes = test.passes(columns[test.column])
            if is_shared:
                shared[number] = passes
        is_match = is_match & passes
        # The other tests are not necessary if nothing passes the first one.
        if not place and not np.count_nonzero(is_match):
            break
    return is_match
