# SPDX-License-Identifier: GPL-3.0-only
"""Connections copied while the kernel writes to them, and joined with earlier records."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.parts import TIME_SHIFT, Direction
from tcpexporter.connections.record import CLOSED, CONNECTION, KEY, Records, Words, words
from tcpexporter.connections.snapshot import (
    OLD_OUTBOUND_BIT,
    consistent_fields,
    first_seen,
    valid_connections,
    valid_old_connections,
)
from tests.unit.socket_tables.test_polling import ages, connections

OLD_CONNECTION = np.dtype(
    [
        ("established_ns", "u8"),
        ("handle", "u8"),
        ("key", KEY),
        ("group", "u4"),
        ("pad", "u4"),
    ]
)
"""The record of version 1 of the layout."""


class ChangingWindow:
    """A window whose slots change as soon as the keys have been copied."""

    def __init__(self, slots: Records, change: Callable[[], None]) -> None:
        self._slots = slots
        self._change = change

    def __getitem__(self, item: str | list[str]) -> Records:
        if item == "key":
            copy = self._slots.copy()
            self._change()
            return copy["key"]
        return self._slots[item]


def numbered(*numbers: int, time: int) -> Words:
    """Return words with these series numbers, and a time in units of 2^13 ns."""
    times = np.full(len(numbers), time << TIME_SHIFT, np.uint64)
    return words(np.array(numbers, np.uint32), times)


def test_a_connection_that_changes_while_it_is_copied_is_left_out() -> None:
    """One closes, one is replaced by another connection, one opens, and two stay."""
    slots = np.zeros(7, CONNECTION)
    slots["key"]["local_port"] = 443
    slots["key"]["remote_port"] = np.arange(7)
    all_words = numbered(7, 7, 7, 0, 0, 7, 0, time=100)
    all_words[6] = CLOSED

    def change() -> None:
        all_words[1] = CLOSED
        all_words[2] = numbered(7, time=101)[0]
        all_words[3] = numbered(7, time=100)[0]

    window = cast("Records", ChangingWindow(slots, change))
    index, found, fields = consistent_fields(window, all_words, "key")
    assert index.tolist() == fields["key"]["remote_port"].tolist() == [0, 5]
    all_words[:] = numbered(3, time=102)
    assert found.tolist() == numbered(7, 7, time=100).tolist()


def test_an_old_connection_that_changes_while_it_is_copied_is_left_out() -> None:
    """Two fields of an old record together identify its connection."""
    slots = np.zeros(6, OLD_CONNECTION)
    slots["key"]["local_port"] = 443
    slots["key"]["remote_port"] = np.arange(6)
    slots["established_ns"] = 100
    slots["group"] = [7, 7, 7, 0, 0, 7]

    def change() -> None:
        slots["group"][1] = 0
        slots["established_ns"][2] = 101
        slots["group"][3] = 7

    found = valid_old_connections(cast("Records", ChangingWindow(slots, change)))
    assert found["key"]["remote_port"].tolist() == [0, 5]
    assert found["established_ns"].tolist() == [100, 100]


def test_invalid_fields_of_a_record_are_corrected() -> None:
    """The direction is no direction, the port is 0, or the time is in the future."""
    left = np.zeros(4, CONNECTION)
    left["key"]["local_port"] = [443, 80, 0, 22]
    left["key"]["local_address"] = 1
    left["is_outbound"] = [2**32 - 1, 0, 1, 1]
    all_words = np.array([1, 2**64 - 1, 1, CLOSED], np.uint64)
    found = valid_connections(left, all_words)
    assert found["key"]["local_port"].tolist() == [443, 80]
    assert found["is_outbound"].tolist() == [Direction.OUTBOUND, Direction.INBOUND]
    assert found["established_ns"].max() <= boottime_ns()


def test_invalid_fields_of_an_old_record_are_corrected() -> None:
    """All bits of the group are set, the port is 0, or the time is in the future."""
    left = np.zeros(5, OLD_CONNECTION)
    left["key"]["local_port"] = [443, 80, 0, 22, 25]
    left["established_ns"] = [1, 2**64 - 1, 1, 1, 5]
    left["group"] = [2**32 - 1, 7, 7, 0, 1 << OLD_OUTBOUND_BIT]
    found = valid_old_connections(left)
    assert found["key"]["local_port"].tolist() == [443, 80, 25]
    assert found["is_outbound"].tolist() == [1, 0, 1]
    assert found["established_ns"].tolist()[::2] == [1, 5]
    assert found["established_ns"].max() <= boottime_ns()


def test_fields_of_a_record_may_have_other_offsets() -> None:
    """Another version may have pinned a longer record with its fields in another order."""
    shuffled = np.dtype(
        {
            "names": ["key", "is_outbound"],
            "formats": [KEY, "u4"],
            "offsets": [16, 4],
            "itemsize": 72,
        }
    )
    left = np.zeros(3, shuffled)
    left["key"]["local_port"] = [443, 80, 22]
    left["key"]["remote_port"] = [7, 11, 13]
    left["is_outbound"] = [1, 0, 1]
    found = valid_connections(left, numbered(5, 0, 9, time=3))
    assert found["key"]["remote_port"].tolist() == [7, 13]
    assert found["established_ns"].tolist() == [3 << TIME_SHIFT] * 2
    assert found["is_outbound"].tolist() == [1, 1]


def test_a_known_connection_keeps_its_time() -> None:
    """A new connection has its own time; a closed one is left out."""
    before = connections(1, 2, 3, 5, seen_ns=100)
    now = connections(7, 5, 3, 11, 2, seen_ns=200)
    found = first_seen(now, [before])
    assert ages(found) == {7: 200, 5: 100, 3: 100, 11: 200, 2: 100}


def test_a_known_connection_keeps_its_direction() -> None:
    """Connections stay inbound when the service stops listening, but new ones are
    outbound."""
    before = connections(1, 2, direction=Direction.INBOUND)
    now = connections(1, 2, 3, direction=Direction.OUTBOUND)
    found = first_seen(now, [before])
    assert found["is_outbound"].tolist() == [
        Direction.INBOUND,
        Direction.INBOUND,
        Direction.OUTBOUND,
    ]


@pytest.mark.parametrize(("now", "before"), [((), ()), ((1, 2, 3), ()), ((), (1, 2, 3))])
def test_there_may_be_no_connections_now_or_before(
    now: tuple[int, ...], before: tuple[int, ...]
) -> None:
    """The result has the present connections with their own times."""
    found = first_seen(connections(*now, seen_ns=200), [connections(*before, seen_ns=100)])
    assert ages(found) == dict.fromkeys(now, 200)


def test_a_key_that_differs_in_one_bit_is_another_connection() -> None:
    """The ports are the same, the remote addresses differ."""
    before = connections(1, seen_ns=100)
    now = connections(1, seen_ns=200)
    now["key"]["remote_address"][0, 15] = 1
    assert ages(first_seen(now, [before])) == {1: 200}
