# SPDX-License-Identifier: GPL-3.0-only
"""Decoding captured, constructed and damaged files of /proc/net/tcp and tcp6."""

import contextlib
import errno
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.diag import SS_ESTABLISHED, SS_LISTEN

from tcpexporter.connections.source import INBOUND
from tcpexporter.errors import SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import procfs
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.procfs import ProcfsReader, decode_lines
from tcpexporter.socket_tables.tables import SocketTables
from tests.support import eventually
from tests.unit.socket_tables.samples import (
    IPV4,
    IPV4_ANY,
    IPV4_CLIENT,
    NETNS,
    Socket,
    captured,
    captured_sockets,
    sockets_of,
)
from tests.unit.socket_tables.test_polling import failing


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that the reader opens instead of /proc/thread-self/net."""
    real_open = os.open

    def open_there(path: str, flags: int) -> int:
        return real_open(path.replace("/proc/thread-self/net", str(tmp_path)), flags)

    monkeypatch.setattr(os, "open", open_there)
    return tmp_path


def put(net: Path, *names: str) -> None:
    for name in names:
        (net / name).write_bytes(captured(f"proc-net-{name}.txt").tobytes())


def read_procfs() -> list[Socket]:
    reader = ProcfsReader(namespaces.OWN)
    first, again = (
        sockets_of(reader.entries(with_ages=True)),
        sockets_of(reader.entries(with_ages=True)),
    )
    reader.close()
    assert first == again
    return first


def listening_or_established() -> set[Socket]:
    return {
        each for each in captured_sockets() if each.state in (SS_LISTEN, SS_ESTABLISHED)
    }


def test_both_files_are_read_from_their_start_each_time(net: Path) -> None:
    """The reader returns listening and established sockets of IPv4 and IPv6."""
    put(net, "tcp", "tcp6")
    found = read_procfs()
    assert len(found) == 27
    assert set(found) == listening_or_established()


@pytest.mark.parametrize("piece_bytes", [150, 151, 163, 307, 1009, 4096])
def test_a_line_can_be_split_between_pieces(
    net: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """One read(2) returns its beginning, and the next one its end."""
    monkeypatch.setattr(procfs, "PIECE_BYTES", piece_bytes)
    put(net, "tcp", "tcp6")
    assert set(read_procfs()) == listening_or_established()


def test_files_with_a_heading_only_are_empty(net: Path) -> None:
    """A namespace without sockets has such files."""
    for name in ("tcp", "tcp6"):
        heading, _, _ = captured(f"proc-net-{name}.txt").tobytes().partition(b"\n")
        (net / name).write_bytes(heading + b"\n")
    assert read_procfs() == []


def test_a_kernel_without_ipv6_has_one_file(net: Path) -> None:
    """The reader returns only IPv4 sockets, and no error."""
    put(net, "tcp")
    assert {each.local for each in read_procfs()} == {IPV4, IPV4_ANY, IPV4_CLIENT}


def test_a_missing_file_is_an_error(net: Path) -> None:
    """The message has the name of the file."""
    with pytest.raises(SocketTableError, match=f"cannot open {net}/tcp: No such file"):
        ProcfsReader(namespaces.OWN)


@pytest.mark.parametrize("opened", range(4))
def test_a_file_that_cannot_be_opened_leaves_no_descriptor_open(
    opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has too many open files before, or after one, two or three of them."""
    numbers = itertools.count()
    open_file = os.open

    def limited(path: str | Path, flags: int) -> int:
        if str(path).startswith("/proc/thread-self/") and next(numbers) == opened:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open_file(path, flags)

    before = {*Path("/proc/self/fd").iterdir()}
    monkeypatch.setattr(os, "open", limited)
    with pytest.raises(SocketTableError, match=r"cannot open .+: Too many open files"):
        ProcfsReader(namespaces.OWN)
    assert {*Path("/proc/self/fd").iterdir()} == before


@pytest.mark.parametrize("name", ["tcp", "tcp6"])
def test_a_file_that_cannot_be_read_is_named(net: Path, name: str) -> None:
    """The reader has opened a directory in place of one of the files."""
    put(net, "tcp", "tcp6")
    (net / name).unlink()
    (net / name).mkdir()
    with contextlib.closing(ProcfsReader(namespaces.OWN)) as reader:
        reason = f"^cannot read /proc/net/{name}: Is a directory$"
        with pytest.raises(SocketTableError, match=reason):
            list(reader.entries(with_ages=True))


def test_listening_leaves_out_connections(net: Path) -> None:
    """All listeners are returned."""
    put(net, "tcp", "tcp6")
    reader = ProcfsReader(namespaces.OWN)
    found = sockets_of(reader.listening())
    reader.close()
    assert {each.local_port for each in found} == {8001, 8002, 8003, 8004, 8005}
    assert len(found) == 5


def line(number: int, port: int, rest: str = " 00000000:00000000 00:00000000") -> bytes:
    """Return a line of /proc/net/tcp for a connection from 127.0.0.1 to itself."""
    address = f"{int.from_bytes(bytes([127, 0, 0, 1]), sys.byteorder):08X}"
    return f"{number:4d}: {address}:{port:04X} {address}:9C41 01{rest}\n".encode()


@pytest.mark.parametrize("numbers", [(0, 1, 2), (9998, 9999, 10000), (7, 123456, 10**9)])
def test_the_first_column_can_be_wide(numbers: Sequence[int]) -> None:
    """From the 10,000th socket on it has more than four characters."""
    text = b"".join(line(number, 443 + place) for place, number in enumerate(numbers))
    entries = decode_lines(text, 1, NETNS)
    assert entries["key"]["local_port"].tolist() == [443, 444, 445]
    assert entries["key"]["remote_port"].tolist() == [40001] * 3
    assert entries["key"]["local_address"][:, -4:].tolist() == [[127, 0, 0, 1]] * 3
    assert entries["state"].tolist() == [SS_ESTABLISHED] * 3
    assert not entries["v6only"].any()


def test_columns_after_the_state_are_ignored() -> None:
    """They may be missing, or have any content."""
    text = line(0, 443, "") + line(1, 444, " one:two :three") + line(2, 445, ":")
    entries = decode_lines(text, 1, NETNS)
    assert entries["key"]["local_port"].tolist() == [443, 444, 445]


def test_a_short_line_is_refused() -> None:
    """It ends before the end of the state. The error has its first byte."""
    whole = line(1, 443)
    needed = whole.index(b" 01") + len(" 01")
    for size in range(needed):
        text = line(0, 80) + whole[:size] + b"\n" + line(2, 8080)
        start = len(line(0, 80))
        with pytest.raises(SocketTableError, match=rf"short line at byte {start}$"):
            decode_lines(text, 1, NETNS)


@pytest.mark.parametrize("bad", [b"G", b"a", b" ", b":", b"\0", b"\xff", b"-"])
def test_a_malformed_line_is_refused(bad: bytes) -> None:
    """Another character replaces a digit. The error has the first byte of the line."""
    whole = line(1, 443)
    start = len(line(0, 80))
    first, end = whole.index(b": ") + 2, whole.index(b" 01") + 3
    for place in range(first, end):
        if whole[place : place + 1] in b" :" and bad in b" :":
            continue
        text = line(0, 80) + whole[:place] + bad + whole[place + 1 :] + line(2, 8080)
        with pytest.raises(SocketTableError, match=rf"malformed line at byte {start}$"):
            decode_lines(text, 1, NETNS)


@pytest.mark.parametrize("words", [1, 4])
def test_a_line_of_the_other_file_is_refused(words: int) -> None:
    """A line of tcp is not valid in tcp6, and the reverse."""
    name = {1: "tcp6", 4: "tcp"}[words]
    _, _, lines = captured(f"proc-net-{name}.txt").tobytes().partition(b"\n")
    with pytest.raises(SocketTableError, match=r"at byte 0$"):
        decode_lines(lines, words, NETNS)


nearly_lines = st.lists(
    st.one_of(
        st.builds(line, st.integers(0, 99999), st.integers(0, 65535)),
        st.text(" :\n0AF", max_size=80).map(str.encode),
        st.binary(max_size=40),
    ),
    max_size=7,
).map(b"".join)


@given(text=st.one_of(st.binary(), nearly_lines), words=st.sampled_from([1, 4]))
def test_any_text_is_decoded_or_refused(text: bytes, words: int) -> None:
    """Decoding ends for any bytes; the only exception is SocketTableError."""
    try:
        entries = decode_lines(text, words, NETNS)
    except SocketTableError:
        return
    assert len(entries) == text.count(b"\n")


HEADING = b"  sl  local_address rem_address   st tx_queue\n"
LINES = [
    b"   0: 0100007F:01BB 00000000:0000 0A 0\n",
    *(b"%4d: 0100007F:01BB 0100007F:9C4%d 01 0\n" % (n, n) for n in (1, 2, 3)),
]
TABLE = HEADING + b"".join(LINES)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that the reader opens instead of /proc/net/tcp."""
    path = tmp_path / "tcp"
    path.write_bytes(TABLE)
    monkeypatch.setattr(procfs, "_open_files", lambda: {1: os.open(path, os.O_RDONLY)})
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "incomplete line at byte 0"),
        (HEADING[:9], "incomplete line at byte 0"),
        (b"".join(LINES), "unknown columns at byte 0"),
        (HEADING.replace(b"rem", b"remote"), "unknown columns at byte 0"),
        (TABLE[:-1], f"incomplete line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE[:-30], f"incomplete line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE[:-30] + b"\n", f"short line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE + b"4: 7F:1\n", f"short line at byte {len(TABLE)}"),
        (
            TABLE + LINES[1].replace(b" 01 ", b" 0? "),
            f"malformed line at byte {len(TABLE)}",
        ),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1 << 20, 59])
def test_an_incomplete_or_unknown_file_is_refused(
    table: Path, text: bytes, reason: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the offset in the file, whatever the size of the pieces is."""
    monkeypatch.setattr(procfs, "PIECE_BYTES", piece_bytes)
    reader = ProcfsReader(namespaces.OWN)
    table.write_bytes(text)
    with pytest.raises(SocketTableError, match=rf"^/proc/net/tcp: {reason}$"):
        list(reader.entries(with_ages=True))
    table.write_bytes(TABLE)
    assert sum(map(len, reader.entries(with_ages=True))) == len(LINES)
    reader.close()


def test_polling_keeps_ages_after_an_error(table: Path) -> None:
    """A poll of an incomplete file fails, and the next complete one has all ages."""
    with contextlib.closing(
        PollingSource(
            SocketTables([ProcfsReader(namespaces.OWN)]), interval_s=0.001, parts=INBOUND
        )
    ) as source:
        source.start()
        before = [each.words.tolist() for each in source.read()]
        assert len(before[0]) == 3
        for torn in (TABLE[:-30], TABLE + b"x\n", b""):
            table.write_bytes(torn)
            eventually(lambda: failing(source))
            table.write_bytes(TABLE)
            eventually(lambda: not failing(source))
            assert [each.words.tolist() for each in source.read()] == before
