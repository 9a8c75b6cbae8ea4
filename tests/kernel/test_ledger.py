# SPDX-License-Identifier: GPL-3.0-only
"""Counters, histograms and label sets, with connections that the test itself opens."""

import contextlib
import itertools
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.collecting import chooser, make_collector, open_source
from tcpexporter.config.settings import Settings
from tcpexporter.config.values import LABELS
from tcpexporter.connections.parts import OWNER_LABELS
from tcpexporter.metrics.collector import ConnectionCollector
from tests.kernel.helpers.identities import AGES, CLOSED, FAILED, LIFETIMES, OPENED
from tests.support import (
    ESTABLISHED,
    Exporter,
    Peers,
    eventually,
    free_port,
    reset,
)

BOUNDS_S = (0.5, 1.0, 2.0)
HISTOGRAMS = ("--histograms", "--buckets", "0.5,1,2", "--duration", "2")
UNIT_S = 8192e-9
"""The unit of the times of connections, in seconds."""

BASIC = [each for each in LABELS if each not in ("netns", *OWNER_LABELS)]

EVERY_SET = [
    *(each for size in range(5) for each in itertools.combinations(BASIC, size)),
    ("unit",),
    ("port", "tcp_version", *OWNER_LABELS),
]

SYN_RETRIES = 1
"""The attempt fails after 3 seconds."""


@contextlib.contextmanager
def collecting(*, labels: Sequence[str], direction: str) -> Iterator[ConnectionCollector]:
    """Open a source and its collector in this process, without an HTTP server."""
    settings = Settings(
        source="ebpf",
        labels=tuple(labels),
        direction=direction,
        histograms=True,
        once=True,
        max_connections=4099,
    )
    source = open_source(settings)
    with contextlib.closing(source):
        source.start()
        choose = chooser(settings, source)
        yield make_collector(source, settings, choose(settings))


def sums(collector: ConnectionCollector) -> Counter[str]:
    """Return the sums of the metrics over all series."""
    found: Counter[str] = Counter()
    for family in collector.collect():
        for each in family.samples:
            if each.name.startswith("tcp_") and not each.name.endswith("sum"):
                found[each.name] += int(each.value)
    return found


@pytest.mark.parametrize(
    "direction",
    [
        pytest.param("inbound", marks=pytest.mark.any_kernel),
        pytest.param("outbound", marks=pytest.mark.any_kernel),
        "all",
    ],
)
def test_the_sums_are_the_same_for_any_labels(direction: str) -> None:
    """18 label sets at once: opened, closed and open are what the test did."""
    ends = 2 if direction == "all" else 1
    with contextlib.ExitStack() as running:
        older = running.enter_context(Peers())
        older.connect(5)
        collectors = [
            running.enter_context(collecting(labels=labels, direction=direction))
            for labels in EVERY_SET
        ]
        four, six = (running.enter_context(Peers(each)) for each in ("::", "::1"))
        four.connect(7, "127.0.0.1")
        six.connect(11)
        older.connect(3)
        for peers, count in ((four, 2), (six, 3), (older, 6)):
            for client, server in peers.pairs[:count]:
                reset(client)
                server.close()
        refused = 0
        if direction != "inbound":
            for _ in range(13):
                refused += is_refused(free_port())
        for labels, collector in zip(EVERY_SET, collectors, strict=True):
            found = sums(collector)
            assert found[OPENED] == 21 * ends, labels
            assert found[CLOSED] == 11 * ends, labels
            assert found[ESTABLISHED] == 15 * ends, labels
            assert found[FAILED] == refused, labels
            assert found[f"{LIFETIMES}_count"] == 11 * ends, labels
            assert found[f"{AGES}_gcount"] == 15 * ends, labels


def is_refused(port: int, address: str = "127.0.0.1") -> bool:
    """Try to connect to a port without a listener."""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, port))
    return True


class Intervals:
    """Intervals that contain the lifetimes or ages of connections, in seconds."""

    def __init__(self) -> None:
        self.least: list[float] = []
        self.most: list[float] = []

    def add(self, opened_ns: tuple[int, int], ended_ns: tuple[int, int]) -> None:
        """Add one; each pair has the times before and after the event."""
        self.least.append((ended_ns[0] - opened_ns[1]) / 1e9 - UNIT_S)
        self.most.append((ended_ns[1] - opened_ns[0]) / 1e9 + UNIT_S)

    def assert_has(self, buckets: Sequence[float | None], total_s: float | None) -> None:
        """Check cumulative buckets and the sum of a histogram."""
        for bound_s, number in zip((*BOUNDS_S, float("inf")), buckets, strict=True):
            assert number is not None
            assert sum(each <= bound_s for each in self.most) <= number
            assert number <= sum(each <= bound_s for each in self.least)
        assert total_s is not None
        assert sum(self.least) <= total_s <= sum(self.most)


def opened_at(peers: Peers) -> tuple[int, int]:
    """Open a connection; return times before and after that."""
    before_ns = boottime_ns()
    peers.connect(1)
    return before_ns, boottime_ns()


def buckets(exporter: Exporter, name: str, **labels: object) -> list[float | None]:
    series = {key: str(value) for key, value in labels.items()}
    bounds = (*map(str, BOUNDS_S), "+Inf")
    return [exporter.value(f"{name}_bucket", le=each, **series) for each in bounds]


def test_lifetimes_are_in_their_buckets() -> None:
    """Connections live for 0.2 s and 1.5 s; buckets and the sum agree with a clock."""
    lifetimes = Intervals()
    with Peers() as peers, Exporter("--source", "ebpf", *HISTOGRAMS) as exporter:
        series = {"port": peers.port, "tcp_version": 4}
        opened = []
        for number, wait_s in ((7, 1.3), (5, 0.2)):
            opened += [opened_at(peers) for _ in range(number)]
            time.sleep(wait_s)
        # The short ones are closed first, and the others after 1.5 s.
        for opened_ns in reversed(opened):
            client, server = peers.pairs.pop()
            before_ns = boottime_ns()
            client.close()
            server.close()
            lifetimes.add(opened_ns, (before_ns, boottime_ns()))
        peers.connect(3)
        assert exporter.value(CLOSED, **series) == 7 + 5
        assert exporter.value(OPENED, **series) == 7 + 5 + 3
        assert exporter.established(peers.port) == 3
        lifetimes.assert_has(
            buckets(exporter, LIFETIMES, **series),
            exporter.value(f"{LIFETIMES}_sum", **series),
        )
        assert exporter.value(f"{LIFETIMES}_count", **series) == 7 + 5


def test_ages_of_open_connections_are_in_their_buckets() -> None:
    """Connections are 0.1 s and 1.4 s old; a closed one is in no bucket any more."""
    with Peers() as peers, Exporter("--source", "ebpf", *HISTOGRAMS) as exporter:
        series = {"port": peers.port, "tcp_version": 4}
        opened = []
        for number, wait_s in ((7, 1.3), (5, 0.1)):
            opened += [opened_at(peers) for _ in range(number)]
            time.sleep(wait_s)
        before_ns = boottime_ns()
        samples = exporter.samples()
        now_ns = before_ns, boottime_ns()
        ages = Intervals()
        for opened_ns in opened:
            ages.add(opened_ns, now_ns)
        labels = tuple(sorted((key, str(value)) for key, value in series.items()))
        bounds = (*map(str, BOUNDS_S), "+Inf")
        ages.assert_has(
            [samples[f"{AGES}_bucket", (("le", each), *labels)] for each in bounds],
            samples[f"{AGES}_gsum", labels],
        )
        for each in peers.pairs.pop():
            each.close()
        assert exporter.value(f"{AGES}_gcount", **series) == 7 + 5 - 1
        assert buckets(exporter, AGES, **series)[-1] == 7 + 5 - 1


def test_the_lifetime_of_a_preexisting_connection_begins_with_its_age() -> None:
    """It was idle before the start, so the socket tables show its age."""
    lifetimes = Intervals()
    with Peers() as peers:
        opened = [opened_at(peers) for _ in range(3)]
        time.sleep(1.1)
        with Exporter("--source", "ebpf", *HISTOGRAMS) as exporter:
            series = {"port": peers.port, "tcp_version": 4}
            for opened_ns in reversed(opened):
                client, server = peers.pairs.pop()
                client.close()
                server.close()
                # The ages of the tables are lower bounds.
                lifetimes.add(opened_ns, (opened_ns[1], boottime_ns()))
            assert exporter.value("tcpexporter_pre_existing_connections") == 3
            assert exporter.value(OPENED, **series) == 0
            assert exporter.value(CLOSED, **series) == 3
            total_s = exporter.value(f"{LIFETIMES}_sum", **series)
            lifetimes.assert_has(buckets(exporter, LIFETIMES, **series), total_s)
            assert total_s is not None
            assert total_s >= 3 * 1.1


OUTBOUND = ("--source", "ebpf", "--direction", "outbound")


def failed(exporter: Exporter, remote_port: int | None, version: int = 4) -> float:
    """Return the number of failed attempts to a port; None: to any port."""
    series: dict[str, str | int] = {"port": "", "tcp_version": version}
    if remote_port is not None:
        series["remote_port"] = remote_port
    return exporter.value(FAILED, **series) or 0


BY_REMOTE_PORT = ("--labels", "port,tcp_version,remote_port")

FAILING = pytest.mark.parametrize(
    "labels",
    [BY_REMOTE_PORT, pytest.param((), marks=pytest.mark.any_kernel)],
    ids=["remote_port", "default"],
)


@FAILING
def test_refused_attempts_are_counted(labels: tuple[str, ...]) -> None:
    """An RST answers the SYN. The series has the remote port only if that is a label."""
    with Exporter(*OUTBOUND, *labels) as exporter:
        port = free_port()
        for _ in range(7):
            assert is_refused(port)
        for _ in range(5):
            assert is_refused(port, "::1")
        shown = port if labels else None
        assert failed(exporter, shown) == 7
        assert failed(exporter, shown, 6) == 5
        with Peers(port=port) as peers:
            peers.connect(3)
            assert failed(exporter, shown) == 7
        names = {
            dict(series)["port"]
            for (name, series), _ in exporter.samples().items()
            if name == FAILED
        }
        assert "" in names
        # No local port of an attempt that failed becomes a label.
        assert len(names) == 1 if labels else len(names) <= 2 + 3 + 3


def test_without_outbound_connections_there_are_no_failed_attempts() -> None:
    """Only outbound attempts are counted, so the metric does not exist."""
    with Exporter("--source", "ebpf") as exporter:
        assert is_refused(free_port())
        assert not any(name == FAILED for name, _ in exporter.samples())


@contextlib.contextmanager
def full_listener() -> Iterator[int]:
    """Yield the port of a listener that ignores SYNs, because its queue is full."""
    with Peers(backlog=0) as peers:
        with socket.create_connection(peers.listener.getsockname()):
            yield peers.port


def attempt(port: int) -> socket.socket:
    """Begin to connect, and return the socket in state SYN_SENT."""
    attempting = socket.socket()
    attempting.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, SYN_RETRIES)
    attempting.setblocking(False)
    with pytest.raises(BlockingIOError):
        attempting.connect(("127.0.0.1", port))
    return attempting


@FAILING
def test_attempts_that_time_out_are_counted(labels: tuple[str, ...]) -> None:
    """No SYN is answered: when the kernel stops trying, the attempt has failed."""
    with full_listener() as port, Exporter(*OUTBOUND, *labels) as exporter:
        shown = port if labels else None
        attempts = [attempt(port) for _ in range(5)]
        assert failed(exporter, shown) == 0
        eventually(lambda: failed(exporter, shown) == 5)
        for each in attempts:
            each.close()
        assert failed(exporter, shown) == 5
        opened = exporter.samples().get(
            (OPENED, (("port", ""), ("remote_port", str(port)), ("tcp_version", "4")))
        )
        assert not opened


def test_an_attempt_that_the_process_closes_is_counted_as_failed() -> None:
    """The socket goes from SYN_SENT to CLOSE when the process closes it."""
    with full_listener() as port, Exporter(*OUTBOUND, *BY_REMOTE_PORT) as exporter:
        attempts = [attempt(port) for _ in range(3)]
        assert failed(exporter, port) == 0
        for each in attempts:
            each.close()
        assert failed(exporter, port) == 3


def by_remote_port(exporter: Exporter, name: str) -> dict[str, float]:
    """Return the values of a metric by remote port, without those of scrapes."""
    return {
        dict(series)["remote_port"]: value
        for (metric, series), value in exporter.samples().items()
        if metric == name and dict(series)["remote_port"] != str(exporter.port)
    }


def test_connections_to_three_ports_are_three_series() -> None:
    """101 outbound connections from 101 local ports: only the remote port is a label."""
    arguments = ("--labels", "remote_port,direction")
    with contextlib.ExitStack() as opened, Exporter(*OUTBOUND, *arguments) as exporter:
        every = [opened.enter_context(Peers()) for _ in range(3)]
        for number in range(101):
            every[number % 3].connect(1)
        true = {str(each.port): len(each.pairs) for each in every}
        assert sorted(true.values()) == [33, 34, 34]
        assert by_remote_port(exporter, ESTABLISHED) == true
        assert by_remote_port(exporter, OPENED) == true
        for each in every[0].pairs:
            reset(each[0])
        assert by_remote_port(exporter, CLOSED) == {
            str(each.port): 34 if each is every[0] else 0 for each in every
        }


def test_directions_have_separate_series() -> None:
    """Each end of a loopback connection is in the series of its direction."""
    arguments = ("--direction", "all", "--labels", "port,remote_port,direction")
    with Peers() as peers, Exporter("--source", "ebpf", *arguments) as exporter:
        peers.connect(7)
        port = str(peers.port)

        def opened(direction: str, **ports: str) -> float | None:
            return exporter.value(OPENED, direction=direction, **ports)

        assert opened("inbound", port=port, remote_port="") == 7
        assert opened("outbound", port="", remote_port=port) == 7
        assert opened("outbound", port=port, remote_port="") is None


def test_all_directions_with_default_labels_have_local_ports() -> None:
    """As in the Go program: the client's end is in the series of its own local port."""
    with Peers() as peers, Exporter("--source", "ebpf", "--direction", "all") as exporter:
        peers.connect(3)
        for client, _ in peers.pairs:
            assert exporter.established(client.getsockname()[1]) == 1
        assert exporter.established(peers.port) == 3
        labels = {
            tuple(name for name, _ in series)
            for (metric, series), _ in exporter.samples().items()
            if metric == ESTABLISHED
        }
        assert labels == {("port", "tcp_version")}
