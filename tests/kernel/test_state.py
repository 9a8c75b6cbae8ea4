# SPDX-License-Identifier: GPL-3.0-only
"""Ages that one exporter saves to a file, and the next one restores."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.parts import SECRET
from tcpexporter.connections.source import INBOUND
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.loading import Loading
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.request import observed
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.saved_ages import State
from tcpexporter.socket_tables.tables import open_tables
from tests.kernel.helpers.forbidden_operations import DONE, REFUSED
from tests.kernel.test_confinement import attempts, within
from tests.kernel.test_pins import COMMAND, EXACT_NS, Timed, known
from tests.support import (
    Exporter,
    Peers,
    eventually,
    inside,
    new_netns,
    reset,
    ss_established,
)

SAVED = "tcpexporter_state_saved_timestamp_seconds"
OFTEN = "from tcpexporter.socket_tables import saved_ages; saved_ages.INTERVAL_S = 0.2"
SAVES_OFTEN = (
    sys.executable,
    "-c",
    f"{OFTEN}; from tcpexporter.__main__ import main; main()",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def run_saving(path: Path, *arguments: str) -> Exporter:
    return Exporter(
        "--source", "ebpf", "--state", str(path), *arguments, command=SAVES_OFTEN
    )


def saved_s(exporter: Exporter) -> float:
    value = exporter.value(SAVED)
    assert value is not None
    return value


def is_saved_since(moment_s: float, exporter: Exporter) -> bool:
    return saved_s(exporter) > moment_s


def wait_for_a_save(exporter: Exporter) -> None:
    """Wait for two saves: the first one that ends may have begun before this call."""
    for _ in range(2):
        eventually(partial(is_saved_since, time.time(), exporter))


@contextlib.contextmanager
def source(
    path: Path, *, netns: str = "self", pin: Path | None = None
) -> Iterator[EbpfSource]:
    """Open and start the source in this process, as the exporter does."""
    state = State.open(path)
    assert state
    with contextlib.closing(Loading(Request(8191, observed(netns), SECRET))) as loading:
        opened = EbpfSource(
            loading,
            netns=netns,
            parts=INBOUND,
            reconcile_interval_s=0,
            reconcile_cpu_share=1,
            pin=str(pin) if pin else None,
            state=state,
        )
    with contextlib.closing(opened), contextlib.closing(state):
        opened.start()
        yield opened


class Reopening:
    """Connections whose address pairs can be opened again at once."""

    def __init__(self, peers: Peers, count: int) -> None:
        self._peers = peers
        self.ports = [self._open(0) for _ in range(count)]

    def _open(self, port: int) -> int:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("127.0.0.1", port))
        client.connect(("127.0.0.1", self._peers.port))
        server, _ = self._peers.listener.accept()
        self._peers.pairs.append((client, server))
        bound: int = client.getsockname()[1]
        return bound

    def reopen(self) -> None:
        """Close each connection, and open its address pair with other sockets."""
        for port in self.ports:
            (pair,) = (
                each for each in self._peers.pairs if each[0].getsockname()[1] == port
            )
            self._peers.pairs.remove(pair)
            for each in pair:
                reset(each)
            assert self._open(port) == port


@pytest.mark.parametrize(
    "ending",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.any_kernel), signal.SIGKILL],
)
def test_the_next_run_restores_ages(path: Path, ending: signal.Signals) -> None:
    """Connections open and close while no exporter runs.

    Those that stayed open keep their ages. The ages of new ones are at most the time
    without an exporter, even with the address pair of an earlier connection.
    """
    with Peers() as before, Peers() as reopened, Peers() as after:
        timed = Timed(before)
        with run_saving(path) as exporter:
            timed.open(1009)
            reopening = Reopening(reopened, 23)
            wait_for_a_save(exporter)
            exporter.process.send_signal(ending)
            exporter.process.wait()
        timed.close(211)
        nobody_ns = boottime_ns()
        reopening.reopen()
        after.connect(101)
        with source(path) as opened:
            timed.assert_known(known(opened, before.port))
            for peers, count in ((reopened, 23), (after, 101)):
                found = known(opened, peers.port)
                assert len(found) == count
                assert (found["established_ns"] >= nobody_ns - EXACT_NS).all()
            for peers in (before, reopened, after):
                found = known(opened, peers.port)
                assert len(found) == ss_established(peers.port)["4"]


@pytest.mark.any_kernel
def test_the_exporter_saves_when_it_ends(path: Path) -> None:
    """SIGTERM arrives long before the next save is due."""
    with Peers() as peers:
        timed = Timed(peers)
        with Exporter("--source", "ebpf", "--state", str(path)) as exporter:
            timed.open(11)
            assert exporter.established(peers.port) == 11
            assert saved_s(exporter) == 0
            assert exporter.stop()[0] == 0
        with source(path) as opened:
            timed.assert_known(known(opened, peers.port))


@pytest.mark.any_kernel
def test_ages_are_kept_through_several_runs(path: Path) -> None:
    """Only the first run had the events of the connections."""
    with Peers() as peers:
        timed = Timed(peers)
        with source(path):
            timed.open(7)
        for _ in range(3):
            with source(path) as opened:
                timed.assert_known(known(opened, peers.port))


@pytest.mark.any_kernel
def test_ages_are_kept_by_polling_runs(path: Path) -> None:
    """An age begins with the first poll that found the connection, in any of the runs."""
    seen = []
    with Peers() as peers:
        peers.connect(7)
        for _ in range(3):
            # sent data makes the age in the socket tables 0
            for client, server in peers.pairs:
                for one, other in ((client, server), (server, client)):
                    one.send(b"x")
                    other.recv(1)
            state = State.open(path)
            tables = open_tables("sock_diag", "self")
            opened = PollingSource(tables, 0.05, state, parts=INBOUND)
            assert state
            with contextlib.closing(opened), contextlib.closing(state):
                opened.start()
                found = opened._last
                here = found[found["key"]["local_port"] == peers.port]
                seen.append(sorted(here["established_ns"].tolist()))
    assert len(seen[0]) == 7
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.any_kernel
def test_ages_of_every_namespace_are_restored(path: Path) -> None:
    """The exporter counts connections of all namespaces."""
    with new_netns() as netns:
        with inside(netns):
            peers = Peers()
        timed = Timed(peers)
        with peers:
            with source(path, netns="all"), inside(netns):
                timed.open(5)
            with source(path, netns="all") as opened:
                timed.assert_known(known(opened, peers.port))


@pytest.mark.any_kernel
def test_ages_are_not_saved_while_maps_are_pinned(path: Path, directory: Path) -> None:
    """A run that pins restores ages from the file; afterwards the pinned maps keep them."""
    with Peers() as peers:
        timed = Timed(peers)
        with source(path):
            timed.open(13)
        before = path.read_bytes()
        for _ in range(2):
            with source(path, pin=directory) as opened:
                timed.assert_known(known(opened, peers.port))
                assert opened.report().state_saved_s is None
        assert path.read_bytes() == before


@pytest.mark.any_kernel
def test_a_second_exporter_gets_an_error(path: Path) -> None:
    """The error is one sentence, and the first exporter continues."""
    with run_saving(path) as exporter:
        ended = subprocess.run(
            [*COMMAND, "--once", "--state", str(path)],
            check=False,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 1
        assert ended.stderr == (
            f"tcpexporter: {path} is in use by another exporter: stop that one, or choose"
            " another path with --state\n"
        )
        assert exporter.is_ready()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, which has space for two saves of two thousand sockets."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path], check=True
    )
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.any_kernel
def test_connections_are_counted_while_the_disk_is_full(small_disk: Path) -> None:
    """There is one warning, and one line when saving succeeds again."""
    path, filler = small_disk / "state", small_disk / "filler"
    with Peers() as peers:
        timed = Timed(peers)
        with run_saving(path) as exporter:
            wait_for_a_save(exporter)
            fill(filler)
            timed.open(1009)
            # Several saves become due.
            eventually(lambda: time.time() - saved_s(exporter) > 1)
            assert exporter.established(peers.port) == 1009
            filler.unlink()
            eventually(partial(is_saved_since, time.time(), exporter))
            code, output = exporter.stop()
        assert code == 0
        logged = [
            line
            for line in output.splitlines()
            if "tcpexporter.socket_tables.saved_ages" in line
        ]
        # A pair of lines repeats if the connections equal those of the last save again.
        assert 2 <= len(logged) <= 6
        for failed, works_again in zip(logged[::2], logged[1::2], strict=True):
            assert failed.endswith(f"ages are not saved: {path}: No space left on device")
            assert works_again.endswith("ages are saved again")
        with source(path) as opened:
            timed.assert_known(known(opened, peers.port))


def test_an_exporter_that_saves_can_write_to_no_other_file(path: Path) -> None:
    """The kernel refuses all forbidden operations, but saving continues."""
    with Exporter(
        "--source", "sock_diag", "--state", str(path), command=within(OFTEN)
    ) as exporter:
        wait_for_a_save(exporter)
        outcomes = attempts(exporter)
        assert {outcomes[name] for name in REFUSED} == {"EPERM"}
        assert DONE not in {outcomes[name] for name in REFUSED}
        wait_for_a_save(exporter)
