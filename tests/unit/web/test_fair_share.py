# SPDX-License-Identifier: GPL-3.0-only
"""The choice of the client to evict, without sockets: clients are names here."""

import pytest

from tcpexporter.web.fair_share import ConnectionSlots, source_network


def any_client(_client: str) -> bool:
    return True


def slots_of(*clients: str) -> ConnectionSlots[str]:
    """Allocate slots to clients in this order of connecting; names are "network client"."""
    slots = ConnectionSlots[str]()
    for now_s, client in enumerate(clients):
        slots.hold(client, client.split()[0], now_s)
    return slots


@pytest.mark.parametrize(
    ("clients", "evicted"),
    [
        (["a 1", "a 2", "a 3"], "a 1"),
        (["a 1", "b 1", "b 2"], "b 1"),
        (["a 1", "b 1", "b 2", "a 2"], "a 1"),
        (["b 1", "a 1", "c 1"], "b 1"),
        (["a 1", "a 2", "a 1"], "a 2"),
        ([], None),
    ],
)
def test_the_longest_waiting_client_of_the_largest_network_is_evicted(
    clients: list[str], evicted: str | None
) -> None:
    """A client's waiting time begins again with each request."""
    assert slots_of(*clients).evictable(any_client) == evicted


def test_clients_that_may_not_be_evicted_are_passed_over() -> None:
    """If no client of the largest network may be evicted, one of the next network is."""
    slots = slots_of("a 1", "a 2", "b 1")
    assert slots.evictable(lambda client: client != "a 1") == "a 2"
    assert slots.evictable(lambda client: client.startswith("b")) == "b 1"
    assert slots.evictable(lambda _: False) is None


def test_a_freed_slot_does_not_count() -> None:
    """Freeing a slot twice, or a slot that was never held, changes nothing."""
    slots = slots_of("a 1", "a 2", "b 1")
    for client in ("a 1", "a 1", "c 1"):
        slots.free(client, client.split()[0])
    assert slots.evictable(any_client) == "a 2"
    for client in ("a 2", "b 1"):
        slots.free(client, client.split()[0])
    assert slots.evictable(any_client) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "", True),
    ],
)
def test_the_source_network_depends_on_the_ip_version(
    one: str, other: str, *, same: bool
) -> None:
    """An IPv4 address is one source network; in IPv6 a source network is a /64."""
    assert (source_network(one) == source_network(other)) is same
