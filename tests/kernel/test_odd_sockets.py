# SPDX-License-Identifier: GPL-3.0-only
"""Counts of sockets that are opened, shared, moved or closed in unusual ways.

The counts of the exporter are compared with those of ss(8).
"""

import contextlib
import errno
import http.client
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.odd_sockets import (
    DEVICE,
    HARDWARE_ADDRESSES,
    SYN_RECV,
    SYN_SENT,
    close_in_repair,
    connect_in_repair,
    dropping_packets,
    held_by_child,
    ip,
    linked_netns,
    listening,
    syn_had_data,
    tcp_state,
)
from tests.kernel.helpers.shared import (
    ALWAYS_LONG_TERM,
    BOTH_ENDS,
    EVERY_NAMESPACE,
    OUTBOUND,
    Exporters,
    unused_port,
)
from tests.support import (
    DEADLINE_S,
    ESTABLISHED,
    LONG_TERM,
    Exporter,
    Peers,
    inside,
    reset,
    ss_established,
)

BY_EVENTS = ("--source", "ebpf")


def eventually(read: Callable[[], object], expected: object) -> None:
    """Wait until ``read`` returns ``expected``; otherwise fail with the last value."""
    until = time.monotonic() + DEADLINE_S
    while (seen := read()) != expected and time.monotonic() < until:
        time.sleep(0.02)
    assert seen == expected


def agree(exporter: Exporter, port: int, expected: int, version: int = 4) -> None:
    """Wait until the exporter and ss(8) both show ``expected`` connections at a port."""
    eventually(
        lambda: (exporter.established(port, version), ss_established(port).total()),
        (expected, expected),
    )


def local_port(opened: socket.socket) -> int:
    port: int = opened.getsockname()[1]
    return port


def set_sysctl(name: str, value: int) -> None:
    """Set a value in the network namespace of this thread, which /proc/sys/net shows."""
    Path("/proc/sys/net", name).write_text(f"{value}\n")


def connected_to_itself(port: int = 0) -> socket.socket:
    opened = socket.socket()
    opened.bind(("127.0.0.1", port))
    opened.connect(opened.getsockname())
    return opened


def test_a_connection_to_itself_counts_once(exporters: Exporters) -> None:
    """Source and destination are equal, so there is one socket and one connection."""
    exporter = exporters(*BOTH_ENDS)
    with contextlib.ExitStack() as open_ones:
        opened = [open_ones.enter_context(connected_to_itself()) for _ in range(5)]
        for each in opened:
            assert each.getpeername() == each.getsockname()
            agree(exporter, local_port(each), 1)
        ended = local_port(opened[0])
        opened[0].close()
        agree(exporter, ended, 0)
        agree(exporter, local_port(opened[1]), 1)


def test_a_connection_to_itself_is_inbound(exporters: Exporters) -> None:
    """Its states are SYN_SENT, SYN_RECV, ESTABLISHED: the last step makes it inbound."""
    inbound, outbound = exporters(*ALWAYS_LONG_TERM), exporters(*OUTBOUND)
    with connected_to_itself(unused_port()) as opened:
        assert inbound.established(local_port(opened)) == 1
        assert outbound.established(local_port(opened)) is None


ADDRESSES = ("192.0.2.2", "192.0.2.3")
"""Addresses of the two ends of a link, from TEST-NET-1 (RFC 5737)."""

CROSSING_PORT = 6007


def delay_packets(address: str) -> None:
    """Give this end its address; packets wait, because the other end answers no ARP
    request."""
    ip("address", "add", f"{address}/24", "dev", DEVICE)
    set_sysctl(f"ipv4/conf/{DEVICE}/arp_ignore", 8)
    set_sysctl(f"ipv4/neigh/{DEVICE}/mcast_solicit", 97)  # seconds until ARP gives up


def release_packets(address: str, hardware_address: str) -> None:
    """Send the waiting packets, by setting the hardware address of the other end."""
    ip("neighbour", "replace", address, "lladdr", hardware_address, "dev", DEVICE)


def begin_to_connect(local: str, remote: str) -> socket.socket:
    opened = socket.socket()
    opened.setblocking(False)
    opened.bind((local, CROSSING_PORT))
    assert opened.connect_ex((remote, CROSSING_PORT)) == errno.EINPROGRESS
    assert tcp_state(opened) == SYN_SENT
    return opened


@contextlib.contextmanager
def opened_simultaneously(other: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open a connection without a listener, from here to the other end of a link.

    Both ends send a SYN before either SYN arrives (RFC 9293, figure 7). The SYNs wait until
    each end has the hardware address of the other.
    """
    delay_packets(ADDRESSES[0])
    with inside(other):
        delay_packets(ADDRESSES[1])
    with contextlib.ExitStack() as opened:
        left = opened.enter_context(begin_to_connect(*ADDRESSES))
        with inside(other):
            right = opened.enter_context(begin_to_connect(*reversed(ADDRESSES)))
        release_packets(ADDRESSES[1], HARDWARE_ADDRESSES[1])
        eventually(lambda: tcp_state(right), SYN_RECV)
        assert tcp_state(left) == SYN_SENT
        with inside(other):
            release_packets(ADDRESSES[0], HARDWARE_ADDRESSES[0])
        yield left, right


def test_a_simultaneous_open_is_one_inbound_connection_at_each_end(
    exporters: Exporters,
) -> None:
    """Two sockets connect to each other, and their SYNs cross.

    Each socket goes from SYN_SENT to SYN_RECV to ESTABLISHED. The last step makes it
    inbound.
    """
    inbound, outbound = exporters(*EVERY_NAMESPACE), exporters(*OUTBOUND)
    both = exporters(*BOTH_ENDS)
    with linked_netns() as other:

        def agree_at_each_end(expected: int) -> None:
            eventually(
                lambda: (
                    inbound.established(CROSSING_PORT, netns="self"),
                    inbound.established(CROSSING_PORT, netns=other),
                ),
                (expected, expected),
            )
            agree(both, CROSSING_PORT, expected)
            with inside(other):
                assert ss_established(CROSSING_PORT).total() == expected

        with opened_simultaneously(other) as (left, _):
            agree_at_each_end(1)
            assert outbound.established(CROSSING_PORT) is None
            reset(left)
            agree_at_each_end(0)


def open_fast(peers: Peers, opened: socket.socket) -> None:
    """Connects, with data in the SYN if the server has sent a Fast Open cookie before."""
    opened.sendto(b"odd", socket.MSG_FASTOPEN, peers.listener.getsockname())


@pytest.fixture
def fast_peers() -> Iterator[Peers]:
    """A server that accepts data in a SYN, and has sent this host a Fast Open cookie."""
    set_sysctl("ipv4/tcp_fastopen", 1 | 2)  # enables clients and servers: ip-sysctl.rst
    with Peers() as peers:
        peers.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 17)
        with socket.socket() as first:
            open_fast(peers, first)
            peers.listener.accept()[0].close()
        yield peers


def test_fast_open_counts_at_both_ends(exporters: Exporters, fast_peers: Peers) -> None:
    """Connections whose SYN carried data are counted and removed like all others."""
    exporter = exporters(*BOTH_ENDS)
    for _ in range(7):
        client = socket.socket()
        open_fast(fast_peers, client)
        server, _ = fast_peers.listener.accept()
        fast_peers.pairs.append((client, server))
        assert server.recv(3) == b"odd"
        assert syn_had_data(client)
        assert syn_had_data(server)
    agree(exporter, fast_peers.port, 7)
    agree(exporter, local_port(fast_peers.pairs[0][0]), 1)
    for client, _ in fast_peers.pairs[:2]:
        client.close()
    agree(exporter, fast_peers.port, 5)


def test_fast_open_counts_from_the_end_of_its_handshake(
    exporters: Exporters, fast_peers: Peers
) -> None:
    """The server accepts and reads in SYN_RECV. The connection counts after the client's
    ACK."""
    exporter = exporters(*BOTH_ENDS)
    with socket.socket() as client:
        client.setblocking(False)
        with dropping_packets(client):
            open_fast(fast_peers, client)
            server, _ = fast_peers.listener.accept()
            fast_peers.pairs.append((client, server))
            assert server.recv(3) == b"odd"
            assert syn_had_data(server)
            assert tcp_state(server) == SYN_RECV
            agree(exporter, fast_peers.port, 0)
        agree(exporter, fast_peers.port, 1)  # the kernel repeats the SYN-ACK after a second


def mptcp_socket(address: str) -> socket.socket:
    opened = socket.socket(proto=socket.IPPROTO_MPTCP)
    opened.bind((address, 0))
    return opened


def refuses_mptcp() -> bool:
    """Return whether this kernel was built without MPTCP: then socket(2) refuses the
    protocol."""
    if Path("/proc/sys/net/mptcp").exists():
        return False
    refusal: int | None = None
    try:
        socket.socket(proto=socket.IPPROTO_MPTCP).close()
    except OSError as error:
        refusal = error.errno
    assert refusal == errno.EPROTONOSUPPORT
    return True


def mptcp_established(port: int) -> int:
    """Return how many MPTCP connections (outer sockets) ss(8) shows at a local port."""
    shown = subprocess.check_output(
        ["ss", "-HMn", "state", "established", f"( sport = :{port} )"], text=True
    )
    return len(shown.splitlines())


@contextlib.contextmanager
def further_subflows(number: int) -> Iterator[None]:
    """Make each MPTCP connection from here open this many subflows after its first one."""
    ip("mptcp", "limits", "set", "subflow", str(number))
    for last in range(1, number + 1):
        ip("mptcp", "endpoint", "add", f"127.0.0.{last}", "dev", "lo", "subflow")
    try:
        yield
    finally:
        ip("mptcp", "endpoint", "flush")
        ip("mptcp", "limits", "set", "subflow", "0")


def test_each_subflow_of_mptcp_counts_once(exporters: Exporters) -> None:
    """Each subflow is a TCP connection, as in /proc/net/tcp, and the outer socket is not.

    The first subflow has the addresses of the outer socket. After that subflow alone has
    ended it is not counted, although the MPTCP connection stays open. On a kernel without
    MPTCP the test only checks that socket(2) refuses it.
    """
    if refuses_mptcp():
        return
    subflows = 3
    exporter = exporters(*BOTH_ENDS)
    with further_subflows(subflows - 1), contextlib.ExitStack() as opened:
        listener = opened.enter_context(mptcp_socket("127.0.0.1"))
        listener.listen()
        port = local_port(listener)
        for _ in range(5):
            client = opened.enter_context(mptcp_socket("127.0.0.5"))
            client.connect(("127.0.0.1", port))
            server = opened.enter_context(listener.accept()[0])
            client.sendall(b"odd")  # further subflows open only after this
            assert server.recv(3) == b"odd"
        agree(exporter, port, 5 * subflows)
        assert mptcp_established(port) == 5
        assert exporter.established(local_port(client)) == 1
        ip("mptcp", "endpoint", "delete", "id", "0", "127.0.0.5")
        agree(exporter, port, 5 * (subflows - 1))
        assert mptcp_established(port) == 5
        assert exporter.established(local_port(client)) == 0


def test_mptcp_that_falls_back_to_tcp_counts_once(exporters: Exporters) -> None:
    """An MPTCP client of a TCP server is one TCP connection at each end."""
    if refuses_mptcp():
        return
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        for _ in range(3):
            client = mptcp_socket("127.0.0.5")
            client.connect(peers.listener.getsockname())
            peers.pairs.append((client, peers.listener.accept()[0]))
        agree(exporter, peers.port, 3)
        agree(exporter, local_port(client), 1)
        client.close()
        agree(exporter, peers.port, 2)
        assert exporter.established(local_port(peers.pairs[0][0])) == 1


def test_connections_in_the_accept_queue_count(exporters: Exporters) -> None:
    """All connections in a full queue are established; further ones are not."""
    # A queue holds one more than the backlog: sk_acceptq_is_full in include/net/sock.h.
    capacity = 7
    exporter = exporters(*BOTH_ENDS)
    with contextlib.ExitStack() as opened:
        peers = opened.enter_context(Peers(backlog=capacity - 1))
        address = peers.listener.getsockname()
        queued = [
            opened.enter_context(socket.create_connection(address)) for _ in range(capacity)
        ]
        agree(exporter, peers.port, capacity)
        agree(exporter, local_port(queued[0]), 1)
        for _ in range(5):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.bind(("127.0.0.1", unused_port()))
            waiting.connect_ex(address)
        agree(exporter, peers.port, capacity)
        assert exporter.established(local_port(waiting)) is None
        assert tcp_state(waiting) == SYN_SENT
        peers.listener.close()
        agree(exporter, peers.port, 0)
        agree(exporter, local_port(queued[0]), 0)


def test_listeners_that_share_a_port_have_one_series(exporters: Exporters) -> None:
    """With SO_REUSEPORT, several listeners each accept some of the connections."""
    exporter = exporters(*BOTH_ENDS)
    with contextlib.ExitStack() as opened:
        listeners: list[socket.socket] = []
        port = 0
        for _ in range(5):
            listener = opened.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(97)
            listener.setblocking(False)
            listeners.append(listener)
            port = local_port(listener)
        for _ in range(97):
            opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        shares = [len(accepted_at(each, opened)) for each in listeners]
        assert sum(shares) == 97
        assert 97 not in shares  # each listener must have some connections
        agree(exporter, port, 97)
        series = re.findall(
            rf'^{ESTABLISHED}{{port="{port}",.*', exporter.get("/metrics"), re.MULTILINE
        )
        assert series == [f'{ESTABLISHED}{{port="{port}",tcp_version="4"}} 97.0']


def accepted_at(
    listener: socket.socket, opened: contextlib.ExitStack
) -> list[socket.socket]:
    """Accept all connections in the queue; ``opened`` closes them when it ends."""
    accepted = []
    with contextlib.suppress(BlockingIOError):
        while True:
            accepted.append(opened.enter_context(listener.accept()[0]))
    return accepted


@pytest.mark.parametrize("end", [0, 1], ids=["client", "server"])
def test_a_connection_closed_in_repair_mode_is_removed(
    exporters: Exporters, end: int
) -> None:
    """TCP_REPAIR closes one end without a packet; the other end detects it when it
    sends."""
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        peers.connect(5)
        pair = peers.pairs[0]
        counts = {local_port(pair[0]): 1, peers.port: 5}
        for port, number in counts.items():
            agree(exporter, port, number)
        closing, remaining = local_port(pair[end]), local_port(pair[1 - end])
        close_in_repair(pair[end])
        agree(exporter, closing, counts[closing] - 1)
        agree(exporter, remaining, counts[remaining])
        pair[1 - end].sendall(b"odd")
        agree(exporter, remaining, counts[remaining] - 1)


@pytest.mark.parametrize("end", [0, 1], ids=["client", "server"])
def test_a_connection_restored_in_repair_mode_counts(
    exporters: Exporters, end: int
) -> None:
    """The connection moves to another socket, counts once, and is removed when it
    closes."""
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        peers.connect(5)
        stays = peers.pairs[0][1 - end]
        local, remote = stays.getpeername(), stays.getsockname()
        count = {0: 1, 1: 5}[end]
        agree(exporter, local[1], count)
        numbers = close_in_repair(peers.pairs[0][end])
        agree(exporter, local[1], count - 1)
        with connect_in_repair(local, remote, numbers) as moved:
            agree(exporter, local[1], count)
            moved.sendall(b"odd")
            assert stays.recv(3) == b"odd"
        agree(exporter, local[1], count - 1)


@pytest.mark.parametrize("end", [0, 1], ids=["client", "server"])
def test_a_socket_shared_by_fork_counts_until_all_processes_have_closed_it(
    exporters: Exporters, end: int
) -> None:
    """The connection is established until both processes have closed the socket."""
    exporter = exporters(*BOTH_ENDS)
    with Peers() as peers:
        peers.connect(3)
        ephemeral = local_port(peers.pairs[0][0])
        agree(exporter, ephemeral, 1)
        with held_by_child(peers.pairs[0][end]):
            peers.pairs[0][end].close()
            agree(exporter, peers.port, 3)
            agree(exporter, ephemeral, 1)
        agree(exporter, peers.port, 2)
        agree(exporter, ephemeral, 0)


REUSED_PORT = 6011


def open_at_reused_port(peers: Peers) -> tuple[socket.socket, socket.socket]:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("127.0.0.1", REUSED_PORT))
    client.connect(peers.listener.getsockname())
    return client, peers.listener.accept()[0]


def test_a_reused_address_pair_has_the_age_of_its_last_connection(effort: Effort) -> None:
    """An RST closes the connection 997 times, and a new one opens within milliseconds.

    The first connection is pre-existing and long-term.
    """
    duration_s = 1
    gaps_s = []
    with contextlib.ExitStack() as opened:
        peers = opened.enter_context(Peers())
        client, server = open_at_reused_port(peers)
        both_ends = ("--source", "ebpf", "--max-series", "65535", "--direction", "all")
        exporter = opened.enter_context(Exporter(*both_ends, "--duration", str(duration_s)))

        def long_term() -> set[float | None]:
            return {exporter.long_term(port) for port in (REUSED_PORT, peers.port)}

        eventually(long_term, {1})
        for _ in range(effort.of(997)):
            reset(client)
            closed_s = time.monotonic()
            server.close()
            client, server = open_at_reused_port(peers)
            gaps_s.append(time.monotonic() - closed_s)
        peers.pairs.append((client, server))
        # the median, because this machine may pause for some time
        assert statistics.median(gaps_s) < 0.02
        agree(exporter, REUSED_PORT, 1)
        agree(exporter, peers.port, 1)
        eventually(lambda: 1 in long_term(), expected=True)
        assert time.monotonic() - closed_s >= duration_s
        eventually(long_term, {1})
        reset(client)
        agree(exporter, REUSED_PORT, 0)
        agree(exporter, peers.port, 0)


def test_link_local_connections_count_as_ipv6(exporters: Exporters) -> None:
    """fe80::2%odd and fe80::3%odd are the ends of a link between two namespaces."""
    here, there = exporters(*BOTH_ENDS), exporters(*EVERY_NAMESPACE)
    with linked_netns() as other, contextlib.ExitStack() as opened:
        ip("address", "add", "fe80::2/64", "dev", DEVICE, "nodad")
        ip("-n", other, "address", "add", "fe80::3/64", "dev", DEVICE, "nodad")
        with inside(other):
            scope = socket.if_nametoindex(DEVICE)
            listener = opened.enter_context(socket.socket(socket.AF_INET6))
            listener.bind(("fe80::3", 0, 0, scope))
            listener.listen()
        port = local_port(listener)
        for _ in range(7):
            address = ("fe80::3", port, 0, socket.if_nametoindex(DEVICE))
            client = opened.enter_context(socket.socket(socket.AF_INET6))
            client.connect(address)
            opened.enter_context(listener.accept()[0])
        agree(here, local_port(client), 1, version=6)
        with inside(other):
            assert ss_established(port) == {"6": 7}
        assert there.established(port, 6, netns=other) == 7
        ended = local_port(client)
        client.close()
        agree(here, ended, 0, version=6)
        eventually(lambda: there.established(port, 6, netns=other), 6)
        with inside(other):
            assert ss_established(port) == {"6": 6}


EVERY_PORT = range(1, 65536)


@pytest.mark.any_kernel
def test_every_port_can_listen(effort: Effort) -> None:
    """Each of 65,535 ports, except that of the exporter, has a series with value 0."""
    ports = EVERY_PORT[:: max(1, round(1 / effort.share))]
    arguments = (*BY_EVENTS, "--max-series", str(len(EVERY_PORT)))
    with Exporter(*arguments) as exporter, listening("127.0.0.2", ports):
        shown = subprocess.check_output(["ss", "-Htln", "src 127.0.0.2"], text=True)
        assert len(shown.splitlines()) == len(ports)
        text = metrics_of(exporter)
        for name in (ESTABLISHED, LONG_TERM):
            series = re.findall(
                rf'^{name}{{port="(\d+)",tcp_version="4"}} 0.0$', text, re.MULTILINE
            )
            zeros = list(map(int, series))
            assert zeros == [port for port in ports if port != exporter.port]


def metrics_of(exporter: Exporter) -> str:
    """Request /metrics from a bound address, because connect(2) would find no free
    port."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", exporter.port, timeout=DEADLINE_S, source_address=("127.0.0.1", 0)
    )
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == http.HTTPStatus.OK
        return response.read().decode()


@contextlib.contextmanager
def client_on_a_link_of_its_own(device: str, port: int) -> Iterator[None]:
    """Connect from fe80::2, port 40009, to fe80::1 on ``device`` of this namespace."""
    with linked_netns(device) as other:
        ip("address", "add", "fe80::1/64", "dev", device, "nodad")
        ip("-n", other, "address", "add", "fe80::2/64", "dev", DEVICE, "nodad")
        with inside(other), socket.socket(socket.AF_INET6) as client:
            scope = socket.if_nametoindex(DEVICE)
            client.bind(("fe80::2", 40009, 0, scope))
            client.connect(("fe80::1", port, 0, scope))
            connected = client.dup()
        with connected:
            yield


def test_two_connections_with_one_key_on_two_devices_count_twice(
    exporters: Exporters,
) -> None:
    """Both are from fe80::2, port 40009, to fe80::1. Pre-existing ones would count as
    one."""
    with contextlib.ExitStack() as opened, Peers("::") as peers:
        exporter = exporters(*ALWAYS_LONG_TERM)
        for device in ("one", "other"):
            opened.enter_context(client_on_a_link_of_its_own(device, peers.port))
        assert ss_established(peers.port) == {"6": 2}
        assert exporter.established(peers.port, 6) == 2
        with Exporter(*BY_EVENTS) as later:
            assert later.established(peers.port, 6) == 1


@pytest.mark.any_kernel
def test_the_exporter_runs_under_ip_netns_exec(netns: str) -> None:
    """ip-netns(8) mounts a new /sys, which has no tracefs."""
    command = ("ip", "netns", "exec", netns, sys.executable, "-m", "tcpexporter")
    with Exporter(*BY_EVENTS, command=command) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3
