# SPDX-License-Identifier: GPL-3.0-only
"""The kernel records while no exporter runs, and the next exporter adopts the records."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections import record as connections
from tcpexporter.connections.parts import SECRET, TIME_SHIFT
from tcpexporter.connections.record import KEY, SERIES_BITS, Records
from tcpexporter.connections.source import INBOUND
from tcpexporter.ebpf import libbpf, pinned_layout, pins
from tcpexporter.ebpf.connection_array import WINDOW
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.loading import Loading
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.pinned_layout import KEY_FIELDS
from tcpexporter.ebpf.pins import CONNECTIONS, CORRECTIONS, LAYOUT, LEDGER, LINK, WORDS
from tcpexporter.ebpf.source import EbpfSource
from tcpexporter.host import namespaces
from tcpexporter.request import observed
from tests.kernel.helpers.in_process import all_connections
from tests.kernel.test_confinement import AS_NOBODY
from tests.support import Exporter, Peers, bpf_programs_by_id, eventually, ss_established

EXACT_NS = 10_000_000
COMMAND = (sys.executable, "-m", "tcpexporter")
GENERATION = (LINK, CONNECTIONS, LAYOUT, WORDS, LEDGER, CORRECTIONS)


def pinned(directory: Path) -> set[str]:
    return {str(each.relative_to(directory)) for each in directory.glob("*/*")}


def run_by_events(directory: Path, *arguments: str) -> Exporter:
    return Exporter("--source", "ebpf", "--pin", str(directory), *arguments)


@contextlib.contextmanager
def source(directory: Path, *, max_connections: int = 8191) -> Iterator[EbpfSource]:
    """Open the source in this process, as the exporter does."""
    with contextlib.closing(
        Loading(Request(max_connections, observed("self"), SECRET))
    ) as loading:
        opened = EbpfSource(
            loading,
            netns="self",
            parts=INBOUND,
            reconcile_interval_s=0,
            reconcile_cpu_share=1,
            pin=str(directory),
        )
    with contextlib.closing(opened):
        yield opened


def known(opened: EbpfSource, port: int) -> Records:
    """Return the connections of a local port that the source has recorded."""
    there = all_connections(opened._tracker)
    found: Records = there[there["key"]["local_port"] == port]
    return found


class Timed:
    """Connections, each with an interval that contains its time of establishment."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.moments: dict[int, tuple[int, int]] = {}
        """Earliest and latest time of establishment, by client port."""

    def open(self, count: int) -> None:
        for _ in range(count):
            before_ns = boottime_ns()
            self._peers.connect(1)
            client, _ = self._peers.pairs[-1]
            self.moments[client.getsockname()[1]] = before_ns, boottime_ns()

    def close(self, count: int) -> None:
        """Close the oldest connections."""
        for client, server in self._peers.pairs[:count]:
            del self.moments[client.getsockname()[1]]
            client.close()
            server.close()
        del self._peers.pairs[:count]

    def assert_known(self, found: Records) -> None:
        """Check that these are all connections, and that each has a time in its
        interval."""
        assert sorted(found["key"]["remote_port"].tolist()) == sorted(self.moments)
        for each in found:
            before_ns, after_ns = self.moments[int(each["key"]["remote_port"])]
            established_ns = int(each["established_ns"])
            assert before_ns - EXACT_NS <= established_ns <= after_ns + EXACT_NS


def test_ages_survive_a_killed_exporter(directory: Path) -> None:
    """1,009 connections are open at SIGKILL; others open and close before the next
    start."""
    with Peers() as peers:
        timed = Timed(peers)
        with run_by_events(directory) as exporter:
            timed.open(1009)
            assert exporter.established(peers.port) == 1009
        assert exporter.process.returncode == -signal.SIGKILL
        for _ in range(211):
            timed.close(7)
            timed.open(11)
            time.sleep(0.047)  # 10 s in total
        with source(directory) as opened:
            opened.start()
            timed.assert_known(known(opened, peers.port))
            assert len(timed.moments) == ss_established(peers.port)["4"]


@pytest.mark.any_kernel
def test_preexisting_connections_keep_their_ages(directory: Path) -> None:
    """Three runs report the same ages, although all connections are older than the runs."""
    with Peers() as peers:
        peers.connect(7)
        seen = []
        for _ in range(3):
            with source(directory) as opened:
                opened.start()
                found = known(opened, peers.port)
                seen.append(sorted(found["established_ns"].tolist()))
                assert len(found) == 7
        assert seen[0] == seen[1] == seen[2]


def test_only_the_last_run_is_recorded(directory: Path) -> None:
    """Each start leaves one generation, and no program of previous runs. The log says once
    how to end the recording."""
    before = set(bpf_programs_by_id())
    removal = f"tcpexporter --unpin --pin {directory} removes it"
    for number in (1, 2, 3):
        with run_by_events(directory) as exporter:
            code, log = exporter.stop()
        assert code == 0
        assert log.count(f"pinned in {directory}; {removal}\n") == 1
        assert pinned(directory) == {f"{number}/{name}" for name in GENERATION}
        eventually(lambda: len(set(bpf_programs_by_id()) - before) == 1)


@pytest.mark.any_kernel
def test_unpin_leaves_nothing(directory: Path) -> None:
    """No file, directory or program remains. It says what it did: a second ``--unpin`` is
    no error, but may be due to a mistake in the path."""
    before = set(bpf_programs_by_id())
    with run_by_events(directory):
        pass
    for said in ("removed what was pinned in", "nothing is pinned in"):
        assert unpin(directory) == f"{said} {directory}\n"
        assert not directory.exists()
    eventually(lambda: set(bpf_programs_by_id()) <= before)


def unpin(directory: Path) -> str:
    """Run ``--unpin`` for a directory, and return its output."""
    command = [*COMMAND, "--unpin", "--pin", str(directory)]
    return subprocess.check_output(command, text=True)


@pytest.mark.any_kernel
def test_unpin_does_not_claim_to_have_removed_what_is_not_pinned(
    directory: Path, tmp_path: Path
) -> None:
    """An empty directory in the BPF file system is removed; one elsewhere stays."""
    directory.mkdir(mode=0o700)
    for path in (directory, tmp_path, tmp_path / "no" / "where"):
        assert unpin(path) == f"nothing is pinned in {path}\n"
    assert not directory.exists()
    assert tmp_path.exists()


@pytest.mark.any_kernel
def test_root_unpins_the_directory_of_another_user(directory: Path, tmp_path: Path) -> None:
    """One such directory is that of the unit. The target of a symbolic link is not
    removed."""
    with run_by_events(directory):
        pass
    for each in (directory, *directory.rglob("*")):
        os.chown(each, 65534, 65534)
    (tmp_path / LINK).touch()
    (directory / "2").symlink_to(tmp_path)
    sentence = refused(directory, "--unpin")
    assert sentence == f"tcpexporter: {directory}/2 cannot be removed: Not a directory"
    assert (tmp_path / LINK).exists()
    (directory / "2").unlink()
    pins.remove(directory)
    assert not directory.exists()


@pytest.mark.any_kernel
def test_a_foreign_file_is_not_unpinned(directory: Path) -> None:
    """One sentence says that the directory is not empty."""
    (directory / "other").mkdir(parents=True)
    sentence = refused(directory, "--unpin")
    assert sentence == f"tcpexporter: {directory} cannot be removed: Directory not empty"
    (directory / "other").rmdir()


def refused(directory: Path, *arguments: str) -> str:
    """Return the error of an exporter that cannot use the directory."""
    ended = subprocess.run(
        [*COMMAND, "--pin", str(directory), *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.any_kernel
def test_a_second_exporter_with_the_same_directory_is_refused(directory: Path) -> None:
    """It neither polls nor unpins, and the first exporter continues."""
    with run_by_events(directory) as exporter, Peers() as peers:
        for arguments in (("--once", "--source", "auto"), ("--unpin",)):
            assert "is in use by another exporter" in refused(directory, *arguments)
        peers.connect(3)
        assert exporter.established(peers.port) == 3


@pytest.mark.any_kernel
def test_a_directory_that_other_users_can_write_is_refused(directory: Path) -> None:
    """Other users could have pinned objects there."""
    directory.mkdir(mode=0o700)
    directory.chmod(0o755)
    assert "is accessible to other users" in refused(
        directory, "--once", "--source", "ebpf"
    )
    directory.chmod(0o700)
    os.chown(directory, 65534, 65534)
    assert "is accessible to other users" in refused(
        directory, "--once", "--source", "ebpf"
    )
    os.chown(directory, 0, 0)


@pytest.mark.any_kernel
def test_pins_that_were_given_to_another_user_are_adopted(directory: Path) -> None:
    """This happens when the user of the unit changes; the new user has CAP_BPF only."""
    with Peers() as peers:
        peers.connect(7)
        with run_by_events(directory):
            pass
        for each in (directory, *directory.rglob("*")):
            os.chown(each, 65534, 65534)
        with Exporter(
            "--source", "ebpf", "--pin", str(directory), command=AS_NOBODY
        ) as exporter:
            assert exporter.established(peers.port) == 7
            code, log = exporter.stop()
        assert code == 0
        assert re.search("adopted [0-9]+ connections of the previous run", log)
        assert pinned(directory) == {f"2/{name}" for name in GENERATION}


@pytest.mark.any_kernel
@pytest.mark.parametrize("name", GENERATION)
def test_a_pinned_object_of_another_kind_is_refused(directory: Path, name: str) -> None:
    """A map of another size or with invalid content is not read."""
    with run_by_events(directory):
        pass
    replace_pin(directory, name, libbpf.create_map(libbpf.BPF_MAP_TYPE_ARRAY, 4, 8))
    sentence = refused(directory, "--once", "--source", "ebpf")
    assert f"{directory}/1/{name} is not an object that an exporter has pinned" in sentence
    assert "--unpin" in sentence


@pytest.mark.any_kernel
def test_an_invalid_pinned_layout_is_refused(directory: Path) -> None:
    """One case is a layout with fields outside of the record."""
    with run_by_events(directory):
        pass
    words = np.full(pinned_layout.LAYOUT_WORDS, 2**31, np.uint32)
    words[0] = pinned_layout.MAGIC
    pin_layout(directory, words)
    assert "is not an object that an exporter has pinned" in refused(directory, "--once")


def test_records_of_another_version_are_adopted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of another version have more fields, and all fields at other offsets."""
    other = np.dtype(
        [
            ("more", "u4", 5),
            ("is_outbound", "u4"),
            ("key", np.dtype([(name, KEY[name]) for name in reversed(KEY_FIELDS)])),
            ("handle", "u8"),
        ]
    )
    assert other.itemsize != connections.CONNECTION.itemsize
    with Peers() as peers:
        timed = Timed(peers)
        timed.open(11)
        with source(directory) as opened:
            opened.start()
            pin_as_another_version(directory, known(opened, peers.port), other, monkeypatch)
        with source(directory) as opened:
            opened.start()
            found = known(opened, peers.port)
        assert sorted(found["established_ns"].tolist()) == [
            11 * (n + 1) << TIME_SHIFT for n in range(11)
        ]


def pin_as_another_version(
    directory: Path,
    found: Records,
    other: np.dtype[np.void],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replace a pinned generation by one of another version, with other times."""
    array = libbpf.create_map(
        libbpf.BPF_MAP_TYPE_ARRAY, 4, other.itemsize, entries=8191, flags=1 << 10
    )
    records = np.zeros(len(found), other)
    for name in KEY_FIELDS:
        records["key"][name] = found["key"][name]
    records["is_outbound"] = found["is_outbound"]
    mapped = MappedArray(array, other, 8191, WINDOW)
    mapped.upto(len(records))[: len(records)] = records
    all_words = libbpf.create_map(
        libbpf.BPF_MAP_TYPE_ARRAY, 4, 8, entries=8191, flags=1 << 10
    )
    word = 11 * (1 + np.arange(len(found), dtype=np.uint64)) << np.uint64(SERIES_BITS)
    MappedArray(all_words, np.dtype("u8"), 8191, WINDOW).upto(len(word))[: len(word)] = (
        word | 1
    )
    with monkeypatch.context() as changed:
        changed.setattr(pinned_layout, "CONNECTION", other)
        changed.setattr(pinned_layout, "KEY", other["key"])
        layout = pinned_layout.make(Request(8191, namespaces.inode(), SECRET))
    replace_pin(directory, CONNECTIONS, array)
    replace_pin(directory, WORDS, all_words)
    pin_layout(directory, layout)


def pin_layout(directory: Path, words: npt.NDArray[np.uint32]) -> None:
    """Replace the layout of the first generation."""
    descriptor = libbpf.create_map(libbpf.BPF_MAP_TYPE_ARRAY, 4, words.nbytes)
    key = ctypes.byref(ctypes.c_uint32(0))
    value = words.ctypes.data_as(ctypes.c_void_p)
    libbpf.call("bpf_map_update_elem", descriptor, key, value, ctypes.c_uint64(0))
    replace_pin(directory, LAYOUT, descriptor)


def replace_pin(directory: Path, name: str, descriptor: int) -> None:
    """Replace an object of the first generation, and close the descriptor."""
    (directory / "1" / name).unlink()
    pins._pin(descriptor, directory / "1" / name)
    os.close(descriptor)
