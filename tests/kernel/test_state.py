# SPDX-License-Identifier: GPL-3.0-only
"""Ages that one exporter saves in a file, and the next one takes over."""

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
from tcpexporter.ebpf.source import EbpfSource
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
OFTEN = "from tcpexporter.socket_tables import saved_ages as state; state.INTERVAL_S = 0.2"
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
    """One that begins from now on: that which ends first may have begun before."""
    for _ in range(2):
        eventually(partial(is_saved_since, time.time(), exporter))


@contextlib.contextmanager
def source(
    path: Path, *, netns: str = "self", pin: Path | None = None
) -> Iterator[EbpfSource]:
    """As the exporter opens it, in this process, when it has started."""
    state = State.open(path)
    assert state
    opened = EbpfSource(
        netns=netns,
        max_connections=8191,
        reconcile_interval_s=0,
        reconcile_cpu_share=1,
        pin=str(pin) if pin else None,
        state=state,
    )
    with contextlib.closing(opened), contextlib.closing(state):
        opened.start()
        yield opened


class Reopening:
    """Connections whose address pairs can be had again at once."""

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
        """Each of them, by other sockets."""
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
def test_the_next_run_takes_ages_over(path: Path, ending: signal.Signals) -> None:
    """A thousand connections, an end, opens and closes with nobody there, a new start.

    What was there has its age, what is new no higher one than it can have, also with the
    address pair of one from before.
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
def test_it_saves_when_it_ends(path: Path) -> None:
    """By a signal, long before the next save is due; and it is no run of a second."""
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
def test_ages_outlive_many_runs(path: Path) -> None:
    """Of which none but the first was told of the connections."""
    with Peers() as peers:
        timed = Timed(peers)
        with source(path):
            timed.open(7)
        for _ in range(3):
            with source(path) as opened:
                timed.assert_known(known(opened, peers.port))


@pytest.mark.any_kernel
def test_who_polls_goes_on_counting(path: Path) -> None:
    """An age is counted from the first poll of the first run that saw the connection."""
    seen = []
    with Peers() as peers:
        peers.connect(7)
        for _ in range(3):
            for client, server in peers.pairs:  # the tables know of no age any more
                for one, other in ((client, server), (server, client)):
                    one.send(b"x")
                    other.recv(1)
            state = State.open(path)
            opened = PollingSource(open_tables("sock_diag", "self"), 0.05, state)
            assert state
            with contextlib.closing(opened), contextlib.closing(state):
                opened.start()
                (found,) = opened.read()
                here = found[found["key"]["local_port"] == peers.port]
                seen.append(sorted(here["established_ns"].tolist()))
    assert len(seen[0]) == 7
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.any_kernel
def test_every_namespace_s_ages_are_taken_over(path: Path) -> None:
    """Where the exporter looks into each of them."""
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
def test_what_is_pinned_is_not_saved(path: Path, directory: Path) -> None:
    """The kernel keeps the ages then, once they have been taken over from the file."""
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
def test_of_two_exporters_the_second_is_refused(path: Path) -> None:
    """With one sentence; the first goes on."""
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
            " another file with --state\n"
        )
        assert exporter.is_ready()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 256 KiB: twice a save of two thousand ends, and more."""
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
def test_a_full_disk_keeps_nobody_from_counting(small_disk: Path) -> None:
    """One warning, one word when there is room again, and then the ages are saved."""
    path, filler = small_disk / "state", small_disk / "filler"
    with Peers() as peers:
        timed = Timed(peers)
        with run_saving(path) as exporter:
            wait_for_a_save(exporter)
            fill(filler)
            timed.open(1009)
            # Several saves that are due.
            eventually(lambda: time.time() - saved_s(exporter) > 1)
            assert exporter.established(peers.port) == 1009
            filler.unlink()
            eventually(partial(is_saved_since, time.time(), exporter))
            code, said = exporter.stop()
        assert code == 0
        told = [
            line
            for line in said.splitlines()
            if "tcpexporter.socket_tables.saved_ages" in line
        ]
        # More than once if by chance it comes back to what was saved already.
        assert 2 <= len(told) <= 6
        for failed, works_again in zip(told[::2], told[1::2], strict=True):
            assert failed.endswith(f"ages are not saved: {path}: No space left on device")
            assert works_again.endswith("ages are saved again")
        with source(path) as opened:
            timed.assert_known(known(opened, peers.port))


def test_who_saves_can_write_to_no_other_file(path: Path) -> None:
    """What serving does not take is refused as ever, and saving goes on."""
    with Exporter(
        "--source", "sock_diag", "--state", str(path), command=within(OFTEN)
    ) as exporter:
        wait_for_a_save(exporter)
        outcomes = attempts(exporter)
        assert {outcomes[name] for name in REFUSED} == {"EPERM"}
        assert DONE not in {outcomes[name] for name in REFUSED}
        wait_for_a_save(exporter)
