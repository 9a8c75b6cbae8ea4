# SPDX-License-Identifier: GPL-3.0-only
"""Every attack in short, by fewer clients; ``python -m tests.hostile`` is the long form."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.hostile.attacks import ATTACKS
from tests.hostile.siege import CONNECTIONS, attack, besieged, newcomers
from tests.hostile.watching import Besieged
from tests.support import Peers, inside, new_netns, why_no_bpf

SECONDS = 1.0
CLIENTS = 307
"""More than there are places."""

Lay = Callable[[str], Besieged]


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    if reason := why_no_bpf():
        pytest.skip(reason)
    with new_netns() as name, inside(name), Peers() as opened:
        opened.connect(CONNECTIONS)
        yield opened


@pytest.fixture(scope="module")
def lay(peers: Peers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lay]:
    """An exporter that is guarded in this way, for all attacks that want it so."""
    running: dict[str, Besieged] = {}
    with contextlib.ExitStack() as stack:

        def lay_one(web: str) -> Besieged:
            if web not in running:
                directory = tmp_path_factory.mktemp("web")
                running[web] = stack.enter_context(besieged(directory, web, peers))
            return running[web]

        yield lay_one


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(lay: Lay, peers: Peers, name: str) -> None:
    """Each scrape is answered, memory and descriptors are bounded, and it is as before."""
    shape = ATTACKS[name]
    figures = attack(
        lay(shape.web),
        peers,
        name,
        seconds=SECONDS,
        clients=None if name == "idle" else min(shape.clients, CLIENTS),  # they come slowly
        guests=newcomers() if shape.web == "passwords" else (),
    )
    assert figures.problems == []
    assert all(each.scrapes for each in (figures.watched.new, figures.watched.kept))
