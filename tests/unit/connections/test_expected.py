# SPDX-License-Identifier: GPL-3.0-only
"""Which connections match a rule, compared with a loop in Python."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpexporter.connections.expected import End, Found, Rule, count_expected
from tcpexporter.connections.record import (
    CLOSED,
    CONNECTION,
    Direction,
    Records,
    Words,
    words,
)

UNITS = {"a.service": (5,), "b.service": (6, 7)}
"""The series numbers of each unit."""

LIMIT_NS = 1 << 40
ADDRESSES = ("127.0.0.1", "192.0.2.10", "192.0.3.10", "2001:db8::1", "2001:db8:1::1", "::1")
NETWORKS = (
    None,
    *map(IPv4Network, ("0.0.0.0/0", "192.0.2.0/24", "192.0.2.10/32", "192.0.0.0/15")),
    *map(IPv6Network, ("::/0", "2001:db8::/32", "2001:db8::/48", "::1/128", "::/1")),
)
PORTS = (1, 80, 443, 65535)


class Made(NamedTuple):
    """A connection; ``number`` 0 is a slot without one."""

    local: str
    local_port: int
    remote: str
    remote_port: int
    direction: int
    number: int
    is_old: bool

    def at(self, end: End, side: str) -> bool:
        address, port = ip_address(getattr(self, side)), getattr(self, f"{side}_port")
        is_there = end.network is None or (
            address.version == end.network.version and address in end.network
        )
        return is_there and end.first_port <= port <= end.last_port

    def matches(self, rule: Rule) -> bool:
        return (
            self.number != 0
            and self.at(rule.remote, "remote")
            and self.at(rule.local, "local")
            and rule.direction in (None, self.direction)
            and (rule.unit is None or self.number in UNITS.get(rule.unit, ()))
        )


def packed(address: IPv4Address | IPv6Address) -> npt.NDArray[np.uint8]:
    mapped = b"" if address.version == 6 else bytes(10) + b"\xff\xff"
    return np.frombuffer(mapped + address.packed, np.uint8)


def slots(made: list[Made]) -> tuple[Records, Words]:
    records = np.zeros(len(made), CONNECTION)
    for record, each in zip(records, made, strict=True):
        for side in ("local", "remote"):
            record["key"][f"{side}_address"] = packed(ip_address(getattr(each, side)))
            record["key"][f"{side}_port"] = getattr(each, f"{side}_port")
        record["is_outbound"] = each.direction
    numbers = np.array([each.number for each in made], np.uint32)
    times = [LIMIT_NS - 1 if each.is_old else LIMIT_NS for each in made]
    return records, words(numbers, np.array(times, np.uint64))


def of_unit(unit: str) -> npt.NDArray[np.bool_]:
    return np.isin(np.arange(8), UNITS.get(unit, ()))


LIMIT = words(np.zeros(1, np.uint32), np.array([LIMIT_NS], np.uint64))[0]

any_connection = st.builds(
    Made,
    st.sampled_from(ADDRESSES),
    st.sampled_from(PORTS),
    st.sampled_from(ADDRESSES),
    st.sampled_from(PORTS),
    st.sampled_from([*Direction]),
    # Number 9 is newer than the table of units.
    st.sampled_from([0, 5, 6, 7, 9]),
    st.booleans(),
)
any_end = st.builds(
    lambda network, ports: End(network, *sorted(ports)),
    st.sampled_from(NETWORKS),
    st.tuples(st.sampled_from((0, *PORTS)), st.sampled_from(PORTS)),
)
any_rule = st.builds(
    Rule,
    st.just("a"),
    st.just("a=…"),
    any_end,
    any_end,
    st.sampled_from([None, *UNITS, "unknown.service"]),
    st.sampled_from([None, *Direction]),
)


@settings(deadline=None)
@given(st.lists(any_connection, max_size=31), st.lists(any_rule, max_size=7), st.data())
def test_matches_are_those_of_a_python_loop(
    made: list[Made], rules: list[Rule], data: st.DataObject
) -> None:
    """This holds for any addresses, ports, directions, units and chunks."""
    cut = data.draw(st.integers(0, len(made)))
    found = count_expected([slots(made[:cut]), slots(made[cut:])], rules, LIMIT, of_unit)
    matching = [[each for each in made if each.matches(rule)] for rule in rules]
    assert found.established.tolist() == [len(each) for each in matching]
    assert found.long_term.tolist() == [
        sum(connection.is_old for connection in each) for each in matching
    ]


@pytest.mark.parametrize("network", ["::/0", "::/1", "::/96"])
def test_a_network_of_ipv6_has_no_ipv4_clients(network: str) -> None:
    """The kernel's socket has the address ::ffff:192.0.2.10 for them."""
    made = [Made("::1", 443, "192.0.2.10", 80, Direction.INBOUND, 5, is_old=True)]
    rule = Rule("a", "", remote=End(IPv6Network(network)))
    assert counted(slots(made), rule) == (0, 0)


def counted(window: tuple[Records, Words], *rules: Rule) -> tuple[int, int]:
    found: Found = count_expected([window], rules, LIMIT, of_unit)
    return int(found.established[0]), int(found.long_term[0])


def test_a_slot_that_changes_meanwhile_is_not_counted() -> None:
    """Its record may be that of another connection."""
    made = [Made("::1", 443, "::1", 80, Direction.INBOUND, 5, is_old=True)] * 3
    records, all_words = slots(made)

    class Changing:
        """Words of which one changes when they have been copied."""

        def copy(self) -> Words:
            before = all_words.copy()
            all_words[1] = CLOSED
            return before

        def __eq__(self, other: object) -> bool:
            same: bool = all_words == other
            return same

        __hash__ = None  # type: ignore[assignment]

    rule = Rule("a", "", local=End(None, 443, 443))
    assert counted((records, Changing()), rule) == (2, 2)  # type: ignore[arg-type]
