# SPDX-License-Identifier: GPL-3.0-only
"""Who has to go: decided on names, without any socket."""

import pytest

from tcpexporter.web.fair_share import Places, neighbourhood


def anybody(_guest: str) -> bool:
    return True


def taken(*guests: str) -> Places[str]:
    """Guests in the order in which they come, each named "where guest"."""
    places = Places[str]()
    for now_s, guest in enumerate(guests):
        places.take(guest, guest.split()[0], now_s)
    return places


@pytest.mark.parametrize(
    ("guests", "leaves"),
    [
        (["a 1", "a 2", "a 3"], "a 1"),
        (["a 1", "b 1", "b 2"], "b 1"),
        (["a 1", "b 1", "b 2", "a 2"], "a 1"),
        (["b 1", "a 1", "c 1"], "b 1"),
        (["a 1", "a 2", "a 1"], "a 2"),
        ([], None),
    ],
)
def test_who_has_to_go(guests: list[str], leaves: str | None) -> None:
    """In the largest neighbourhood whoever has waited longest, since the last request."""
    assert taken(*guests).dispensable(anybody) == leaves


def test_who_may_stay() -> None:
    """Whoever may not go is passed over, be it that the smallest neighbourhood is next."""
    places = taken("a 1", "a 2", "b 1")
    assert places.dispensable(lambda guest: guest != "a 1") == "a 2"
    assert places.dispensable(lambda guest: guest.startswith("b")) == "b 1"
    assert places.dispensable(lambda _: False) is None


def test_who_is_gone_does_not_count() -> None:
    """Nor does whoever leaves twice, or was never there."""
    places = taken("a 1", "a 2", "b 1")
    for guest in ("a 1", "a 1", "c 1"):
        places.leave(guest, guest.split()[0])
    assert places.dispensable(anybody) == "a 2"
    for guest in ("a 2", "b 1"):
        places.leave(guest, guest.split()[0])
    assert places.dispensable(anybody) is None


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
def test_neighbourhood(one: str, other: str, *, same: bool) -> None:
    """IPv4 by address, IPv6 by network."""
    assert (neighbourhood(one) == neighbourhood(other)) is same
