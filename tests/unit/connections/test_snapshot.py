# SPDX-License-Identifier: GPL-3.0-only
"""Connections copied while the kernel writes to them, and joined with earlier records."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.counting import count, select
from tcpexporter.connections.record import (
    CONNECTION,
    Direction,
    Records,
    directions,
    groups,
)
from tcpexporter.connections.snapshot import (
    consistent_fields,
    first_seen,
    valid_connections,
)
from tests.unit.socket_tables.test_polling import ages, connections


class ChangingWindow:
    """A window that changes as soon as the keys have been copied."""

    def __init__(self, slots: Records, change: Callable[[Records], None]) -> None:
        self._slots = slots
        self._change = change

    def __getitem__(self, item: str) -> Records:
        if item == "key":
            copy = self._slots.copy()
            self._change(self._slots)
            return copy["key"]
        return self._slots[item]


def test_a_connection_that_changes_while_it_is_copied_is_left_out() -> None:
    """One closes, one is replaced by another connection, one opens, and two stay."""
    slots = np.zeros(6, CONNECTION)
    slots["key"]["local_port"] = 443
    slots["key"]["remote_port"] = np.arange(6)
    slots["established_ns"] = 100
    slots["group"] = [7, 7, 7, 0, 0, 7]

    def change(slots: Records) -> None:
        slots["group"][1] = 0
        slots["established_ns"][2] = 101
        slots["group"][3] = 7

    window = cast("Records", ChangingWindow(slots, change))
    index, fields = consistent_fields(window, "key")
    assert index.tolist() == fields["key"]["remote_port"].tolist() == [0, 5]
    slots["established_ns"] = 102
    assert fields["established_ns"].tolist() == [100, 100]
    assert fields["group"].tolist() == [7, 7]


def test_invalid_fields_of_a_record_are_corrected() -> None:
    """The group differs from the key, the port is 0, or the time is in the future. All
    are counted."""
    left = np.zeros(4, CONNECTION)
    left["key"]["local_port"] = [443, 80, 0, 22]
    left["key"]["local_address"] = 1
    left["established_ns"] = [1, 2**64 - 1, 1, 1]
    left["group"] = [2**32 - 1, 7, 7, 0]
    found = valid_connections(left)
    assert found["key"]["local_port"].tolist() == [443, 80]
    expected = np.array([Direction.OUTBOUND, Direction.INBOUND])
    assert found["group"].tolist() == groups(found["key"], expected).tolist()
    assert found["established_ns"].max() <= boottime_ns()
    everything = select((), tcpv6=True, directions=tuple(Direction), own_listener=None)
    assert count([found], everything, 1 << 62).total == 2


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
    assert directions(found["group"]).tolist() == [
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
