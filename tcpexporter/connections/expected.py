# SPDX-License-Identifier: GPL-3.0-only
"""Counts the connections that rules expect: those between certain addresses and ports."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import (
    IPV4_PREFIX,
    SERIES_MASK,
    Direction,
    Records,
    Words,
    ip_versions,
)

Network: TypeAlias = IPv4Network | IPv6Network

V4_MAPPED = IPv6Network("::ffff:0:0/96")
"""The addresses of IPv4 in a key; no IPv6 network of a rule includes them."""


class End(NamedTuple):
    """What a rule expects of one end of a connection."""

    network: Network | None = None
    """The address is in this network; None: it is any address."""
    first_port: int = 0
    last_port: int = 65535


ANY = End()


@dataclass(frozen=True)
class Rule:
    """Which connections are expected, and how many."""

    name: str
    text: str
    """The rule as the operator wrote it, with its name."""
    remote: End = ANY
    local: End = ANY
    unit: str | None = None
    """The systemd unit that owns the socket; None: any owner."""
    direction: Direction | None = None
    minimum: int = 1

    def __str__(self) -> str:
        return self.text


class Found(NamedTuple):
    """How many connections match each rule; both arrays have one element for each rule."""

    established: npt.NDArray[np.int64]
    long_term: npt.NDArray[np.int64]


class _Test(NamedTuple):
    """A condition: (column & mask) - first <= span, in numbers of 32 bits."""

    column: str
    word: int
    """Which word of an address; 0 for another column."""
    mask: np.uint32
    first: np.uint32
    span: np.uint32


Matcher: TypeAlias = Sequence[_Test]
"""The conditions of a rule; those that fewest connections satisfy come first."""


def matcher(rule: Rule) -> Matcher:
    """Return the conditions of a rule, without that of the unit."""
    tests = [*_tests_of("remote", rule.remote), *_tests_of("local", rule.local)]
    if rule.direction is not None:
        tests.append(_equal("is_outbound", rule.direction))
    return tests


def _equal(column: str, value: int) -> _Test:
    every_bit = np.uint32(0xFFFFFFFF)
    return _Test(column, 0, every_bit, np.uint32(value), np.uint32(0))


def _tests_of(side: str, end: End) -> Iterator[_Test]:
    first, last = np.uint32(end.first_port), np.uint32(end.last_port)
    if last - first < 65535:
        yield _Test(f"{side}_port", 0, np.uint32(0xFFFF), first, last - first)
    if end.network is None:
        return
    prefix = IPV4_PREFIX.tobytes() if isinstance(end.network, IPv4Network) else b""
    bits = end.network.prefixlen + 8 * len(prefix)
    mask = ((1 << bits) - 1 << 128 - bits).to_bytes(16, "big")
    address = prefix + end.network.network_address.packed
    masks, values = np.frombuffer(mask, np.uint32), np.frombuffer(address, np.uint32)
    # The last word differs most between addresses.
    for word in reversed(range(4)):
        if masks[word]:
            column = f"{side}_address"
            yield _Test(column, word, masks[word], values[word], np.uint32(0))
    if isinstance(end.network, IPv6Network) and V4_MAPPED.subnet_of(end.network):
        yield _equal(f"{side}_is_ipv4", 0)


def count_expected(
    windows: Iterable[tuple[Records, Words]],
    rules: Sequence[Rule],
    limit: np.uint64,
    of_unit: Callable[[str], npt.NDArray[np.bool_]],
) -> Found:
    """Count the connections that match each rule.

    A connection that opens or closes meanwhile may be left out. One that is established all
    the time is counted. It does not loop over connections in Python.

    Args:
        windows: records and words of slots, which the kernel may write to at any time.
        rules: the rules.
        limit: words from this one on are those of connections that are not long-term.
        of_unit: returns, for each series number, whether a unit owns its connections.
    """
    matchers = [matcher(each) for each in rules]
    needed = {(test.column, test.word) for tests in matchers for test in tests}
    owned = {each: of_unit(each) for each in {rule.unit for rule in rules if rule.unit}}
    established, long_term = np.zeros((2, len(rules)), np.int64)
    for records, words in windows:
        before = words.copy()
        columns = {each: _column(records, *each) for each in needed}
        numbers = before & np.uint64(SERIES_MASK)
        # A slot whose word has changed may have the record of another connection.
        is_open = (numbers != 0) & (words == before)
        is_old = is_open & (before < limit)
        units = {
            each: _looked_up(by_number, numbers.view(np.int64))
            for each, by_number in owned.items()
        }
        for at, (rule, tests) in enumerate(zip(rules, matchers, strict=True)):
            is_match = units[rule.unit] if rule.unit else None
            is_match = _matching(columns, tests, is_match)
            if is_match is not None:
                established[at] += np.count_nonzero(is_match & is_open)
                long_term[at] += np.count_nonzero(is_match & is_old)
    return Found(established, long_term)


def _column(records: Records, name: str, word: int) -> npt.NDArray[np.uint32]:
    """Return a copy of a column as numbers of 32 bits; of an address, one of its words."""
    key = records["key"]
    if name.endswith("_address"):
        words: npt.NDArray[np.uint32] = key[name].view(np.uint32)[:, word].copy()
        return words
    if name == "is_outbound":
        found = records[name] != 0
    elif name.endswith("_is_ipv4"):
        found = ip_versions(key, name.replace("_is_ipv4", "_address")) == 4
    else:
        found = key[name]
    copied: npt.NDArray[np.uint32] = found.astype(np.uint32)
    return copied


def _looked_up(
    by_number: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return the values of numbers; a number that is newer than the array has none."""
    found: npt.NDArray[np.bool_] = np.append(by_number, False).take(numbers, mode="clip")
    return found


def _matching(
    columns: Mapping[tuple[str, int], npt.NDArray[np.uint32]],
    tests: Matcher,
    is_match: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.bool_] | None:
    """Return which records satisfy all tests and match already; None: none of them."""
    for test in tests:
        values = columns[test.column, test.word]
        # Numbers below the first one wrap around, and become large.
        satisfied = (values & test.mask) - test.first <= test.span
        if is_match is not None:
            satisfied &= is_match
        if not satisfied.any():
            return None
        is_match = satisfied
    return is_match
