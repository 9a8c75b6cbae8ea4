# SPDX-License-Identifier: GPL-3.0-only
"""The metric families of distinct clients."""

from collections.abc import Sequence
from ipaddress import ip_address

import numpy as np
import pytest

from tcpexporter.connections.parts import Direction, client_masks, kernel_parts
from tcpexporter.connections.record import IPV4_PREFIX, SOCKET, Records
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import MemorySource
from tcpexporter.metrics.collector import Choice, ConnectionCollector

NOW_NS = 1_000 * 10**9
DURATION_S = 6
NETNS = 4026531840
ESTABLISHED = "tcp_established_clients"
LONG_TERM = "tcp_longterm_clients"
LARGEST = "tcp_largest_client_connections"
FAMILIES = (ESTABLISHED, LONG_TERM, LARGEST)


def connections(port: int, number: int, address: str, *, age_s: float = 60) -> Records:
    """Return connections of one IPv4 client."""
    made = np.zeros(number, SOCKET)
    made["key"]["local_port"] = port
    made["key"]["remote_port"] = range(40000, 40000 + number)
    made["key"]["netns"] = NETNS
    packed = np.frombuffer(ip_address(address).packed, np.uint8)
    for end in ("local_address", "remote_address"):
        made["key"][end][:, :12] = IPV4_PREFIX
        made["key"][end][:, 12:] = packed
    made["established_ns"] = NOW_NS - int(age_s * 10**9)
    return made


def collected(
    *chunks: Records,
    labels: Sequence[str] = ("port",),
    max_series: int = 101,
    ports: Sequence[int] = (),
    has_clients: bool = True,
    duration_s: int = DURATION_S,
    bounds_s: Sequence[float] = (),
) -> dict[str, dict[str, float]]:
    """Return the values of the families of clients, by port."""
    directions = [Direction.INBOUND]
    masks = client_masks(32, 64) if has_clients else None
    selection = select((), tcpv6=True, directions=directions, labels=labels)
    parts = kernel_parts(directions, labels, client_masks=masks)
    collector = ConnectionCollector(
        MemorySource(chunks, parts=parts, bounds_s=bounds_s),
        Choice(selection, named(ports, NETNS, selection), duration_s),
        max_series=max_series,
        bounds_s=bounds_s,
        has_clients=has_clients,
        boottime_ns=lambda: NOW_NS,
    )
    return {
        family.name: {each.labels.get("port", ""): each.value for each in family.samples}
        for family in collector.collect()
        if "client" in family.name
    }


def test_clients_are_counted_by_series() -> None:
    """Each client counts once in each of its series; a named port has 0 clients."""
    found = collected(
        connections(443, 7, "192.0.2.1", age_s=DURATION_S),
        connections(443, 3, "192.0.2.2", age_s=DURATION_S - 1),
        connections(443, 2, "192.0.2.3", age_s=DURATION_S - 1),
        connections(443, 5, "192.0.2.3"),
        connections(80, 11, "192.0.2.1", age_s=0),
        ports=[22],
    )
    assert found == {
        ESTABLISHED: {"22": 0, "80": 1, "443": 3},
        LONG_TERM: {"22": 0, "80": 0, "443": 2},
        LARGEST: {"22": 0, "80": 11, "443": 7},
    }


def test_a_client_of_several_ports_is_one_client_of_the_host() -> None:
    """Without labels its connections to all ports count together."""
    found = collected(
        connections(443, 7, "192.0.2.1"),
        connections(443, 13, "192.0.2.2"),
        connections(80, 11, "192.0.2.1"),
        labels=(),
    )
    assert found == {ESTABLISHED: {"": 2}, LONG_TERM: {"": 2}, LARGEST: {"": 18}}


def test_folded_series_count_each_client_once() -> None:
    """Two of three ports are in the series ``other``; one client uses both."""
    found = collected(
        connections(443, 7, "192.0.2.1"),
        connections(80, 3, "192.0.2.1"),
        connections(22, 2, "192.0.2.1"),
        connections(22, 1, "192.0.2.2"),
        max_series=1,
    )
    assert found == {
        ESTABLISHED: {"443": 1, "other": 2},
        LONG_TERM: {"443": 1, "other": 2},
        LARGEST: {"443": 7, "other": 5},
    }


def test_behind_a_proxy_one_client_has_all_connections() -> None:
    """This is how the metrics show that clients cannot be counted here."""
    found = collected(
        connections(8080, 997, "192.0.2.1"), connections(8080, 2, "127.0.0.1")
    )
    assert found[ESTABLISHED] == {"8080": 2}
    assert found[LARGEST] == {"8080": 997}


def test_without_clients_there_are_no_families() -> None:
    """--clients=false omits them, instead of exposing 0."""
    assert collected(connections(443, 7, "192.0.2.1"), has_clients=False) == {}


@pytest.mark.parametrize("duration_s", [2003, 9_000_000_001])
@pytest.mark.parametrize("bounds_s", [(), (6.0, 3001.0, 5003.0)])
def test_no_client_is_long_term_before_the_host_was_up_for_the_duration(
    duration_s: int, bounds_s: Sequence[float]
) -> None:
    """Bounds of histograms that are older than the boot do not change that.

    This holds for a duration that is inexact as a floating-point number of ns, too.
    """
    assert duration_s * 10**9 > NOW_NS
    chunks = [connections(443, 2, f"192.0.2.{number}") for number in (1, 2, 3)]
    found = collected(*chunks, duration_s=duration_s, bounds_s=bounds_s)
    assert found[ESTABLISHED] == {"443": 3}
    assert found[LONG_TERM] == {"443": 0}


@pytest.mark.parametrize("has_clients", [False, True])
def test_without_connections_only_named_ports_have_clients(*, has_clients: bool) -> None:
    """The exposition has the families of clients and connections, without samples."""
    expected = {each: {"22": 0} for each in FAMILIES if has_clients}
    assert collected(ports=[22], has_clients=has_clients) == expected
