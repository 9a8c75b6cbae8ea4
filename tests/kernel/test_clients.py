# SPDX-License-Identifier: GPL-3.0-only
"""Distinct clients: thousands of addresses, compared with ``ss | sort -u | wc -l``."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tcpexporter.connections.identity import client_hashes
from tcpexporter.connections.parts import client_masks
from tcpexporter.connections.record import numbers
from tcpexporter.connections.source import INBOUND
from tcpexporter.ebpf import reconcile
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.in_process import Dumps, attach
from tests.kernel.helpers.many_clients import (
    Clients,
    Server,
    clients,
    distinct,
    ipv4_addresses,
    ipv6_addresses,
    route_ipv6,
)
from tests.support import ESTABLISHED, Exporter, eventually

CLIENTS = "tcp_established_clients"
LONG_TERM_CLIENTS = "tcp_longterm_clients"
LARGEST = "tcp_largest_client_connections"

ALWAYS_LONG_TERM = ("--duration", "0")
POLLING = ("--interval", "0.1", "--source")
PREFIXES = ((32, 64), (24, 56), (32, 128))


def given(prefix: tuple[int, int]) -> tuple[str, ...]:
    ipv4, ipv6 = prefix
    return "--client-prefix", f"{ipv4},{ipv6}"


@pytest.fixture
def server(netns: str) -> Iterator[Server]:
    del netns
    route_ipv6()
    with Server() as opened:
        yield opened


def shown(exporter: Exporter, port: int) -> dict[str, Clients]:
    """Return the clients of a port in one scrape, by IP version."""
    samples = exporter.samples()

    def value(name: str, version: str) -> int:
        labels = (("port", str(port)), ("tcp_version", version))
        return int(samples[name, labels])

    found = {}
    for version in ("4", "6"):
        number, long_term = value(CLIENTS, version), value(LONG_TERM_CLIENTS, version)
        assert long_term == number <= value(ESTABLISHED, version)
        if number:
            found[version] = Clients(number, value(LARGEST, version))
    return found


def compare(exporters: Sequence[tuple[Exporter, tuple[int, int]]], port: int) -> None:
    """Check that every exporter shows the clients of a port that ss(8) shows."""
    for exporter, prefix in exporters:
        expected = clients(port, *prefix)
        if prefix == (32, 128):
            assert sum(each.number for each in expected.values()) == distinct(port)
        if shown(exporter, port) != expected:
            assert may_be_late(exporter)
            eventually(partial(shows, exporter, port, expected))


def shows(exporter: Exporter, port: int, expected: dict[str, Clients]) -> bool:
    return shown(exporter, port) == expected


def may_be_late(exporter: Exporter) -> bool:
    """Return whether the exporter polls, or the kernel may have skipped its program."""
    return exporter.value("tcpexporter_missed_events_total") != 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_program_and_userspace_compute_the_same_hash(
    prefix: tuple[int, int], server: Server
) -> None:
    """The clients of reported connections have the hashes that seeds would get.

    A client of IPv4 has the same hash through both kinds of sockets.
    """
    masks = client_masks(*prefix)
    ipv4, ipv6 = ipv4_addresses(101), ipv6_addresses(53, 3)
    with contextlib.closing(attach(parts=replace(INBOUND, client_masks=masks))) as tracker:
        server.connect(ipv4)
        server.connect(ipv4, mapped=True)
        server.connect(ipv6)
        records, all_words = tracker._array.used()
        hashes = np.concatenate([each.clients for each in tracker.chunks()])
        here = (numbers(all_words) != 0) & (records["key"]["local_port"] == server.port)
        found = hashes[: len(records)][here]
        assert len(found) == 2 * 101 + 3 * 53
        assert (found == client_hashes(records["key"][here], masks)).all()
        expected = sum(each.number for each in clients(server.port, *prefix).values())
        assert len({*found.tolist()}) == expected


def test_seeds_have_the_hashes_of_reported_connections(server: Server) -> None:
    """A client with a connection of each kind is one client."""
    masks = client_masks(32, 64)
    ipv4, ipv6 = ipv4_addresses(101), ipv6_addresses(53, 1)
    server.connect([*ipv4, *ipv6])
    with contextlib.closing(attach(parts=replace(INBOUND, client_masks=masks))) as tracker:
        server.connect(ipv4[:53], mapped=True)
        server.connect(ipv6[:31])
        with Dumps() as dumps:
            reconcile.seed(tracker, dumps)
        records, all_words = tracker._array.used()
        hashes = np.concatenate([each.clients for each in tracker.chunks()])
        here = (numbers(all_words) != 0) & (records["key"]["local_port"] == server.port)
        assert len(hashes[: len(records)][here]) == 101 + 53 + 53 + 31
        assert len({*hashes[: len(records)][here].tolist()}) == 101 + 53


@pytest.mark.any_kernel
@pytest.mark.timeout(600)
def test_thousands_of_clients_are_those_of_ss(server: Server, effort: Effort) -> None:
    """Each source shows them, at each quiet point: opened, partly closed, opened again.

    Most clients have several connections. Some clients of IPv4 use AF_INET6. One exporter
    has seen all openings, the others start when most connections are open.
    """
    ipv4 = ipv4_addresses(effort.of(2003))
    ipv6 = ipv6_addresses(effort.of(211), 5)
    sources = (
        ("--source", "ebpf"),
        *[(*POLLING, each) for each in ("sock_diag", "procfs")],
    )
    with contextlib.ExitStack() as undo:
        running: list[tuple[Exporter, tuple[int, int]]] = []

        def run(source: Sequence[str], prefix: tuple[int, int]) -> None:
            exporter = Exporter(*ALWAYS_LONG_TERM, *source, *given(prefix))
            running.append((undo.enter_context(exporter), prefix))

        run(sources[0], PREFIXES[0])
        run(sources[0], PREFIXES[1])
        server.connect([*ipv4, *ipv6])
        server.connect(ipv4[::2], mapped=True)
        server.connect([*ipv4[::3], *ipv6[::2], *ipv6[:1] * 13])
        compare(running, server.port)
        for source, prefix in zip(sources, itertools.cycle(PREFIXES), strict=False):
            run(source, prefix)
        run(sources[0], PREFIXES[2])
        compare(running, server.port)
        for step in (3, 2):
            server.close_one_in(step)
            compare(running, server.port)
        server.connect([*ipv4[::2], *ipv6[::3]])
        compare(running, server.port)
        server.close_one_in(1)
        compare(running, server.port)
        assert shown(running[0][0], server.port) == {}


@pytest.mark.any_kernel
def test_adopted_connections_are_hashed_again(server: Server, directory: Path) -> None:
    """The next run has another secret. Nevertheless a client of both runs is one client.

    Other connections of the same clients open while no exporter runs.
    """
    arguments = (*ALWAYS_LONG_TERM, "--source", "ebpf", "--pin", str(directory))
    ipv4, ipv6 = ipv4_addresses(401), ipv6_addresses(53, 3)
    with Exporter(*arguments) as exporter:
        server.connect([*ipv4, *ipv6])
        compare([(exporter, (32, 64))], server.port)
    server.connect([*ipv4[::2], *ipv6[::2]])
    server.close_one_in(5)
    with Exporter(*arguments) as exporter:
        compare([(exporter, (32, 64))], server.port)
        server.connect([*ipv4[::3], *ipv6[::3]])
        compare([(exporter, (32, 64))], server.port)
    with Exporter(*arguments, *given((24, 56))) as exporter:
        compare([(exporter, (24, 56))], server.port)


@pytest.mark.any_kernel
def test_behind_a_proxy_one_client_has_nearly_all_connections(server: Server) -> None:
    """This is how the metrics show that clients cannot be counted there."""
    with Exporter(*ALWAYS_LONG_TERM, "--source", "ebpf") as exporter:
        server.connect(["127.0.0.9"] * 499)
        server.connect(ipv4_addresses(2))
        assert shown(exporter, server.port) == {"4": Clients(3, 499)}


@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_without_clients_nothing_about_them_is_shown(source: str, server: Server) -> None:
    """--clients=false omits the families, for each source."""
    server.connect(ipv4_addresses(7))
    with Exporter("--clients=false", "--source", source) as exporter:
        assert exporter.established(server.port) == 7
        assert not [name for name, _ in exporter.samples() if "client" in name]
