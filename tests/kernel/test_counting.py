# SPDX-License-Identifier: GPL-3.0-only
"""The counts of real sockets by the exporter equal those of ss(8)."""

import contextlib
import ctypes
import http.client
import re
import socket
import subprocess
import time
from collections import Counter

import pytest

from tests.kernel.helpers.shared import (
    AFTER_A_SECOND,
    ALWAYS_LONG_TERM,
    BOTH_ENDS,
    EVERY_NAMESPACE,
    OUTBOUND,
    Exporters,
    unused_port,
)
from tests.support import (
    ESTABLISHED,
    LONG_TERM,
    Exporter,
    Peers,
    eventually,
    inside,
    new_netns,
    reset,
    ss_established,
)

NAMED_PORTS = ("--port", "4001-4210,8443", "--max-series", "101")


def test_ipv4_and_ipv6_are_counted_separately(exporters: Exporters) -> None:
    """Both metrics have connections under the IP version on the wire."""
    exporter = exporters(*ALWAYS_LONG_TERM)
    with Peers() as four, Peers("::1", unused_port()) as six:
        four.connect(7)
        six.connect(5)
        assert exporter.established(four.port, 4) == 7
        assert exporter.long_term(four.port, 4) == 7
        assert exporter.established(six.port, 6) == 5
        assert exporter.long_term(six.port, 6) == 5
        assert exporter.established(six.port, 4) is None


def test_an_ipv4_client_of_a_dual_stack_socket_is_ipv4(exporters: Exporters) -> None:
    """``::ffff:a.b.c.d`` is version 4; IPv6 clients of the same port are version 6."""
    exporter = exporters(*ALWAYS_LONG_TERM)
    with Peers("::") as both:
        both.connect(11, "127.0.0.1")
        both.connect(3, "::1")
        assert exporter.established(both.port, 4) == 11
        assert exporter.established(both.port, 6) == 3
        assert ss_established(both.port) == {"4": 11, "6": 3}


def test_direction_selects_inbound_outbound_or_both(exporters: Exporters) -> None:
    """A loopback connection has an inbound and an outbound end; inbound is the default."""
    inbound, outbound = exporters(*ALWAYS_LONG_TERM), exporters(*OUTBOUND)
    both = exporters(*BOTH_ENDS)
    with Peers() as peers:
        server, ephemeral = peers.port, connect_from(unused_port(), peers)
        assert inbound.established(server) == 1
        assert inbound.established(ephemeral) is None
        assert outbound.established(ephemeral) == 1
        assert outbound.established(server) == 0
        assert both.established(ephemeral) == 1
        assert both.established(server) == 1


def connect_from(port: int, peers: Peers) -> int:
    """Connect once from a port, and return the port."""
    client = socket.create_connection(
        peers.listener.getsockname(), source_address=("127.0.0.1", port)
    )
    peers.pairs.append((client, peers.listener.accept()[0]))
    return port


def test_a_connection_becomes_long_term_at_its_duration(exporters: Exporters) -> None:
    """It is established at once, and becomes long-term after ``duration``, not before."""
    exporter = exporters(*AFTER_A_SECOND)
    with Peers() as peers:
        opened_s = time.monotonic()
        peers.connect(3)
        assert exporter.established(peers.port) == 3
        eventually(lambda: exporter.long_term(peers.port) == 3)
        assert time.monotonic() - opened_s >= 1


@pytest.mark.parametrize("end", [0, 1], ids=["client", "server"])
def test_a_half_closed_connection_is_not_counted(exporters: Exporters, end: int) -> None:
    """The first FIN ends the counting at both ends, in FIN_WAIT1 and in CLOSE_WAIT."""
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        peers.connect(5)
        ephemeral = peers.pairs[0][0].getsockname()[1]
        assert exporter.established(ephemeral) == 1
        peers.pairs[0][end].shutdown(socket.SHUT_WR)
        assert exporter.established(peers.port) == 4
        assert exporter.long_term(peers.port) == 4
        assert exporter.established(ephemeral) == 0
        assert ss_established(peers.port) == {"4": 4}


@pytest.mark.parametrize("end", [0, 1], ids=["client", "server"])
def test_a_reset_connection_is_not_counted(exporters: Exporters, end: int) -> None:
    """By RST both ends change from ESTABLISHED to CLOSE."""
    exporter = exporters(*ALWAYS_LONG_TERM)
    with Peers() as peers:
        peers.connect(5)
        reset(peers.pairs[0][end])
        assert exporter.established(peers.port) == 4


def test_a_disconnected_socket_is_not_counted(exporters: Exporters) -> None:
    """By connect(AF_UNSPEC) a socket changes from ESTABLISHED to CLOSE."""
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        peers.connect(2)
        client, _ = peers.pairs[0]
        ephemeral = client.getsockname()[1]
        assert exporter.established(ephemeral) == 1
        disconnect(client)
        assert exporter.established(ephemeral) == 0


def disconnect(connected: socket.socket) -> None:
    """Call connect(2) with AF_UNSPEC, an address that Python's socket does not support."""
    unspecified = ctypes.create_string_buffer(16)
    assert ctypes.CDLL(None).connect(connected.fileno(), unspecified, 16) == 0


def test_a_listener_without_connections_has_a_series_at_0() -> None:
    """An alert on ``== 0`` works from the first scrape, for each IP version of the
    listener."""
    with Peers() as four, Peers("::") as both, Peers("::1") as six, Exporter() as exporter:
        samples = exporter.samples()
        shown = {
            dict(labels)["port"] + "/" + dict(labels)["tcp_version"]: value
            for (name, labels), value in samples.items()
            if name == "netstat_tcp_longterm_connections_total"
        }
        assert shown == {
            f"{four.port}/4": 0,
            f"{both.port}/4": 0,
            f"{both.port}/6": 0,
            f"{six.port}/6": 0,
        }


def test_a_port_keeps_its_series_after_its_listener_has_closed(
    exporters: Exporters,
) -> None:
    """The series of a service that has ended stays at 0."""
    exporter = exporters(*ALWAYS_LONG_TERM)
    with Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3
    assert exporter.established(peers.port) == 0


def test_a_named_port_has_a_series_at_0_without_a_listener(exporters: Exporters) -> None:
    """``--port`` shows its ports from the first scrape, and no other ports."""
    exporter = exporters(*NAMED_PORTS)
    with Peers() as other:
        other.connect(1)
        assert exporter.established(4001) == 0
        assert exporter.established(8443, 6) == 0
        assert exporter.established(other.port) is None


@pytest.mark.any_kernel
def test_without_tcpv6_only_ipv4_is_shown() -> None:
    """``--tcpv6=false`` excludes IPv6 connections and listeners."""
    with Exporter("--tcpv6=false") as exporter, Peers("::") as both:
        both.connect(3, "127.0.0.1")
        both.connect(5, "::1")
        assert exporter.established(both.port, 4) == 3
        assert exporter.established(both.port, 6) is None


@pytest.mark.any_kernel
def test_simple_shows_one_number() -> None:
    """``--simple`` shows the sum as one series without labels."""
    with (
        Exporter("--simple", *ALWAYS_LONG_TERM) as exporter,
        Peers() as a,
        Peers("::1") as b,
    ):
        a.connect(7)
        b.connect(11)
        assert exporter.value("netstat_tcp_longterm_connections_total") == 18
        assert exporter.value("tcp_established_connections") == 18


def test_the_exporters_own_port_is_never_counted(exporters: Exporters) -> None:
    """Neither its listener nor the connections of its clients are counted."""
    exporter = exporters(*ALWAYS_LONG_TERM)
    with socket.create_connection(("127.0.0.1", exporter.port)):
        assert exporter.established(exporter.port) is None


def test_other_namespaces_are_counted_only_with_netns_all(exporters: Exporters) -> None:
    """``--netns self`` counts what /proc/net/tcp shows; ``all`` counts the whole host."""
    own, every = exporters(*ALWAYS_LONG_TERM), exporters(*EVERY_NAMESPACE)
    with new_netns() as elsewhere:
        with inside(elsewhere):
            peers = Peers(port=unused_port())
            peers.connect(7)
        with peers:
            assert own.established(peers.port) is None
            assert every.established(peers.port, netns=elsewhere) == 7
            with inside(elsewhere):
                peers.connect(3)
            assert own.established(peers.port) is None
            assert every.established(peers.port, netns=elsewhere) == 10


def shown(exporter: Exporter, name: str) -> dict[tuple[str, str], float]:
    """Scrape once, and return the values of a metric by port and IP version."""
    return {
        (dict(labels)["port"], dict(labels)["tcp_version"]): value
        for (metric, labels), value in exporter.samples().items()
        if metric == name
    }


def ss_at_ports(ports: set[int]) -> Counter[str]:
    """Return how many connections ss(8) shows at some local ports, by IP version."""
    lines = subprocess.check_output(
        ["ss", "-Htn", "state", "established"], text=True
    ).splitlines()
    ends = (line.split()[2].rpartition(":") for line in lines)
    return Counter(
        "6" if "[" in address else "4" for address, _, port in ends if int(port) in ports
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
def test_folding_ports_loses_no_connection(source: str) -> None:
    """The 101 largest of 211 listeners are shown; the sums equal those of ss(8)."""
    arguments = ("--source", source, "--max-series", "101", *ALWAYS_LONG_TERM)
    with contextlib.ExitStack() as opened, Exporter(*arguments) as exporter:
        every = [
            opened.enter_context(Peers("::1" if number % 3 == 0 else "127.0.0.1"))
            for number in range(211)
        ]
        for number, peers in enumerate(every):
            peers.connect(number % 5)
        true = ss_at_ports({each.port for each in every})
        assert sum(true.values()) == sum(number % 5 for number in range(211)) == 420
        eventually(lambda: sum(shown(exporter, ESTABLISHED).values()) == 420)
        for name in (ESTABLISHED, LONG_TERM):
            page = shown(exporter, name)
            sums: Counter[str] = Counter()
            for (_, version), value in page.items():
                sums[version] += int(value)
            assert sums == true
            kept = {each: value for each, value in page.items() if each[0] != "other"}
            assert len(kept) == 101
            assert len(page) == 101 + 2
            largest = sorted((number % 5 for number in range(211)), reverse=True)[:101]
            assert sorted(kept.values(), reverse=True) == largest
        assert exporter.value("tcpexporter_folded_series") == 211 - 101
        assert shown(exporter, ESTABLISHED).keys() == shown(exporter, LONG_TERM).keys()


@pytest.mark.any_kernel
def test_a_named_port_is_not_folded(exporters: Exporters) -> None:
    """``--port`` shows all its ports, even more than ``--max-series``."""
    exporter = exporters(*NAMED_PORTS)
    page = shown(exporter, ESTABLISHED)
    assert set(page.values()) == {0}
    assert len(page) == 2 * (210 + 1)
    assert exporter.value("tcpexporter_folded_series") == 0


def test_kernel_events_are_counted(exporters: Exporters) -> None:
    """Each connection adds two to inserted when it opens, and to removed when it closes.

    All scrapes use one connection, which stays open.
    """
    exporter = exporters(*BOTH_ENDS)
    scraper = http.client.HTTPConnection("127.0.0.1", exporter.port)

    def events() -> dict[str, float]:
        scraper.request("GET", "/metrics")
        page = scraper.getresponse().read().decode()
        name = "tcpexporter_kernel_events_total"
        found = re.findall(rf'^{name}{{action="(\w+)"}} (.*)$', page, re.MULTILINE)
        return {action: float(value) for action, value in found}

    def is_quiet() -> bool:
        before = events()
        time.sleep(0.2)
        return events() == before

    with contextlib.closing(scraper), Peers() as peers:
        eventually(is_quiet)  # connections of earlier tests may close late
        before = events()
        peers.connect(13)
        for client, server in peers.pairs[:5]:
            client.close()
            server.close()
        expected = {
            "inserted": before["inserted"] + 2 * 13,
            "removed": before["removed"] + 2 * 5,
            "refused": 0,
        }
        eventually(lambda: events() == expected)


def test_a_reused_address_pair_has_its_own_age(exporters: Exporters) -> None:
    """The second connection with the same addresses and ports starts with age 0."""
    exporter = exporters(*AFTER_A_SECOND)
    with Peers() as peers:
        for _ in range(2):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("127.0.0.1", 61543))
            opened_s = time.monotonic()
            client.connect(("127.0.0.1", peers.port))
            server, _ = peers.listener.accept()
            peers.pairs.append((client, server))
            assert exporter.established(peers.port) == 1
            eventually(lambda: exporter.long_term(peers.port) == 1)
            assert time.monotonic() - opened_s >= 1
            reset(client)
            server.close()
            assert exporter.established(peers.port) == 0
