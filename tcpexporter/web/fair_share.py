# SPDX-License-Identifier: GPL-3.0-only
"""Who has to go when there is no place for all: one of those who have most places."""

import socket
from collections.abc import Callable
from itertools import chain
from typing import Generic, TypeVar

_T = TypeVar("_T")


def neighbourhood(host: str) -> str:
    """What shares alike: an IPv4 address, or the network of an IPv6 address.

    Of the last 64 bits a host can have whatever it likes.
    """
    if ":" not in host:
        return host
    address, _, _scope = host.partition("%")
    return socket.inet_pton(socket.AF_INET6, address)[:8].hex()


class Places(Generic[_T]):
    """Guests by neighbourhood, and since when each has waited.

    A neighbourhood that takes many places loses them to others. Who is alone in one loses
    the place only when everybody is.
    """

    def __init__(self) -> None:
        """Begin with nobody."""
        self._taken: dict[str, dict[_T, float]] = {}

    def take(self, guest: _T, where: str, now_s: float) -> None:
        """Have the guest wait from now on, be it for the first time or again."""
        guests = self._taken.setdefault(where, {})
        guests.pop(guest, None)
        guests[guest] = now_s  # the last one: they are in the order in which they began

    def leave(self, guest: _T, where: str) -> None:
        """Forget the guest."""
        guests = self._taken.get(where, {})
        guests.pop(guest, None)
        if not guests:
            self._taken.pop(where, None)

    def dispensable(self, may_go: Callable[[_T], bool]) -> _T | None:
        """Of those who may go, in the largest neighbourhood: who has waited longest."""
        largest_first = sorted(
            self._taken.values(),
            key=lambda guests: (-len(guests), next(iter(guests.values()))),
        )
        return next(filter(may_go, chain.from_iterable(largest_first)), None)
