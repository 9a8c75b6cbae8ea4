# SPDX-License-Identifier: GPL-3.0-only
"""Runs each attack briefly with few clients; ``python -m tests.hostile`` runs longer."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.hostile.attacking import CONNECTIONS, attack, first_logins, start_exporter
from tests.hostile.attacks import ATTACKS
from tests.hostile.watching import AttackedExporter
from tests.support import Peers, inside, new_netns, why_no_bpf

SECONDS = 1.0
CLIENTS = 307
"""Number of clients, which is higher than the number of connection slots."""

ExporterFor = Callable[[str], AttackedExporter]


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    if reason := why_no_bpf():
        pytest.skip(reason)
    with new_netns() as name, inside(name), Peers() as opened:
        opened.connect(CONNECTIONS)
        yield opened


@pytest.fixture(scope="module")
def exporter_for(
    peers: Peers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ExporterFor]:
    """Return a shared exporter with the web configuration that an attack requires."""
    running: dict[str, AttackedExporter] = {}
    with contextlib.ExitStack() as stack:

        def exporter_with(web: str) -> AttackedExporter:
            if web not in running:
                directory = tmp_path_factory.mktemp("web")
                running[web] = stack.enter_context(start_exporter(directory, web, peers))
            return running[web]

        yield exporter_with


@pytest.mark.parametrize("name", ATTACKS)
def test_the_exporter_survives_an_attack(
    exporter_for: ExporterFor, peers: Peers, name: str
) -> None:
    """Scrapes succeed, memory and descriptors stay limited, and the exporter recovers."""
    shape = ATTACKS[name]
    figures = attack(
        exporter_for(shape.web),
        peers,
        name,
        seconds=SECONDS,
        clients=None
        if name == "idle"
        else min(shape.clients, CLIENTS),  # clients of this attack connect slowly
        first_logins=first_logins() if shape.web == "passwords" else (),
    )
    assert figures.problems == []
    assert all(each.scrapes for each in (figures.watched.new, figures.watched.kept))
