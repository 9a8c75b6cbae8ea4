# SPDX-License-Identifier: GPL-3.0-only
"""Connections copied while the kernel writes to them, and joined with earlier records."""

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.counting import count, select
from tcpexporter.connections.record import CONNECTION, Direction, directions, groups
from tcpexporter.connections.snapshot import first_seen, valid_connections
from tests.unit.socket_tables.test_polling import ages, connections


def test_nonsense_in_a_record_does_no_harm() -> None:
    """A group that is not its key's, no port, a time to come: scrapes go on."""
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


def test_a_known_connection_keeps_its_age() -> None:
    """What was there before keeps its time, what is new has its own, the rest is gone."""
    before = connections(1, 2, 3, 5, seen_ns=100)
    now = connections(7, 5, 3, 11, 2, seen_ns=200)
    found = first_seen(now, [before])
    assert ages(found) == {7: 200, 5: 100, 3: 100, 11: 200, 2: 100}


def test_a_known_connection_keeps_its_direction() -> None:
    """A service that stops listening keeps its connections inbound; new ones are not."""
    before = connections(1, 2, direction=Direction.INBOUND)
    now = connections(1, 2, 3, direction=Direction.OUTBOUND)
    found = first_seen(now, [before])
    assert directions(found["group"]).tolist() == [
        Direction.INBOUND,
        Direction.INBOUND,
        Direction.OUTBOUND,
    ]


@pytest.mark.parametrize(("now", "before"), [((), ()), ((1, 2, 3), ()), ((), (1, 2, 3))])
def test_nothing_may_be_known(now: tuple[int, ...], before: tuple[int, ...]) -> None:
    """No connection now, or none before, is no trouble."""
    found = first_seen(connections(*now, seen_ns=200), [connections(*before, seen_ns=100)])
    assert ages(found) == dict.fromkeys(now, 200)


def test_a_key_that_differs_anywhere_is_new() -> None:
    """Age goes by the whole key: another address with the same ports is another."""
    before = connections(1, seen_ns=100)
    now = connections(1, seen_ns=200)
    now["key"]["remote_address"][0, 15] = 1
    assert ages(first_seen(now, [before])) == {1: 200}
