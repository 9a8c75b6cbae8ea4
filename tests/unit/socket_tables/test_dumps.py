# SPDX-License-Identifier: GPL-3.0-only
"""Tables that break off in the middle: nothing is lost, and the next look is whole."""

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, SS_ESTABLISHED, SS_LISTEN

from tcpexporter.errors import SocketTableError, SourceError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import tables as sockets
from tcpexporter.socket_tables.polling import PollingSource
from tcpexporter.socket_tables.tables import FEW, ProcfsReader, SockDiagReader, SocketTables
from tests.fuzz.targets import Datagrams
from tests.support import Peers, eventually
from tests.unit.socket_tables.test_tables import attribute, diag_message, message

STATES = 1 << SS_ESTABLISHED | 1 << SS_LISTEN


def done(sequence: int) -> bytes:
    return message(NLMSG_DONE, bytes(4), sequence=sequence)


def sent(*datagrams: bytes) -> sockets._Dumps:
    return sockets._Dumps(cast("socket.socket", Datagrams(datagrams)))


def ports(dumps: sockets._Dumps) -> list[int]:
    return [
        int(port)
        for rows in dumps.read(STATES, 0)
        for port in sockets._diag_entries(rows, 1)["key"]["local_port"]
    ]


def refusal(dumps: sockets._Dumps) -> str:
    with pytest.raises(SocketTableError) as caught:
        ports(dumps)
    return str(caught.value)


def whole(first: int, *, ports: tuple[int, int] = (443, 80)) -> list[bytes]:
    """A dump of each family, the first of which has that sequence number."""
    return [
        diag_message(port, sequence=sequence) + done(sequence)
        for sequence, port in zip((first, first + 1), ports, strict=True)
    ]


@pytest.mark.parametrize(
    "stale",
    [
        diag_message(7, sequence=0),
        done(0),
        message(NLMSG_ERROR, struct.pack("=i", -16), sequence=0),
        done(1 + (1 << 16)),
    ],
)
def test_answers_to_another_request_are_passed_over(stale: bytes) -> None:
    """Neither sockets nor the end nor an error of an abandoned dump are taken for ours."""
    assert ports(sent(stale, *whole(1))) == [443, 80]


@pytest.mark.parametrize(
    ("datagrams", "reason"),
    [
        ([diag_message(443, sequence=1)], "does not answer .timed out"),
        ([diag_message(443, sequence=1)[:-8]], "does not answer"),
        ([diag_message(443, sequence=1), b"\1"], "does not answer"),
        ([diag_message(443, sequence=1)[:50] + done(1)], "malformed message at byte 0$"),
        (
            [diag_message(443, sequence=1) + diag_message(443, sequence=2) + done(1)],
            "malformed message at byte 88$",
        ),
        (
            [diag_message(443, sequence=1) + done(1) + done(1)],
            "malformed message at byte 88$",
        ),
        (
            [message(SOCK_DIAG_BY_FAMILY, bytes(80) + done(1), sequence=1)],
            "no end at byte 116$",
        ),
        ([message(1, bytes(80), sequence=1), done(1)], "malformed message at byte 0$"),
    ],
)
def test_a_dump_that_breaks_off_is_no_short_one(
    datagrams: list[bytes], reason: str
) -> None:
    """It is an error that says where; the next look passes over what is left of it."""
    end = [] if datagrams[-1].endswith(done(1)) and "no end" not in reason else [done(1)]
    opened = Datagrams(datagrams)
    dumps = sockets._Dumps(cast("socket.socket", opened))
    with pytest.raises(SocketTableError, match=reason):
        ports(dumps)
    opened.send_later([diag_message(80, sequence=1), *end, *whole(2)])
    assert ports(dumps) == [443, 80]


def test_runs_are_as_long_as_they_are() -> None:
    """About as many alike as are looked at first, fewer, and many times more."""
    sizes = [FEW - 1, FEW, FEW + 1, 1, 7 * FEW, 2, FEW]
    messages = [
        diag_message(number, *[attribute(8, bytes(4))] * (number % 2), sequence=1) * size
        for number, size in enumerate(sizes)
    ]
    (second,) = whole(2)[:1]
    dumps = sent(b"".join(messages) + done(1), second)
    found = [len(rows) for rows in dumps.read(STATES, 0)]
    assert found == [*sizes, 1]


def test_an_end_that_never_comes_is_waited_for_once() -> None:
    """Nor is the exporter stuck with a dump whose end was lost."""
    opened = Datagrams([diag_message(443, sequence=1)])
    dumps = sockets._Dumps(cast("socket.socket", opened))
    assert "timed out" in refusal(dumps)
    assert "timed out" in refusal(dumps)
    opened.send_later(whole(2))
    assert ports(dumps) == [443, 80]


def test_the_kernel_goes_on_after_a_dump_that_was_given_up() -> None:
    """It refuses another while one is under way (EBUSY): what is left is read first."""
    with Peers() as peers:
        peers.connect(307)
        reader = SockDiagReader(namespaces.OWN)
        # So that the kernel cannot be ahead of what is read.
        reader._for_entries._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(sockets, "REPLY_BYTES", sockets.DATAGRAM_BYTES)
            with contextlib.closing(reader.entries(with_ages=True)) as given_up:  # type: ignore[type-var]
                next(given_up)
        found = np.concatenate(list(reader.entries(with_ages=True)))
        reader.close()
    at_port = found[found["key"]["local_port"] == peers.port]
    assert np.count_nonzero(at_port["state"] == SS_ESTABLISHED) == 307


HEADING = b"  sl  local_address rem_address   st tx_queue\n"
LINES = [
    b"   0: 0100007F:01BB 00000000:0000 0A 0\n",
    *(b"%4d: 0100007F:01BB 0100007F:9C4%d 01 0\n" % (n, n) for n in (1, 2, 3)),
]
TABLE = HEADING + b"".join(LINES)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is read instead of /proc/net/tcp."""
    path = tmp_path / "tcp"
    path.write_bytes(TABLE)
    monkeypatch.setattr(sockets, "_open_procfs", lambda: {1: os.open(path, os.O_RDONLY)})
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "torn line at byte 0"),
        (HEADING[:9], "torn line at byte 0"),
        (b"".join(LINES), "other columns than known at byte 0"),
        (HEADING.replace(b"rem", b"remote"), "other columns than known at byte 0"),
        (TABLE[:-1], f"torn line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE[:-30], f"torn line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE[:-30] + b"\n", f"short line at byte {len(TABLE) - len(LINES[-1])}"),
        (TABLE + b"4: 7F:1\n", f"short line at byte {len(TABLE)}"),
        (
            TABLE + LINES[1].replace(b" 01 ", b" 0? "),
            f"malformed line at byte {len(TABLE)}",
        ),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1 << 20, 59])
def test_a_table_that_is_not_as_known_is_refused(
    table: Path, text: bytes, reason: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever pieces it is read, the error names the byte of the file."""
    monkeypatch.setattr(sockets, "PIECE_BYTES", piece_bytes)
    reader = ProcfsReader(namespaces.OWN)
    table.write_bytes(text)
    with pytest.raises(SocketTableError, match=rf"^/proc/net/tcp: {reason}$"):
        list(reader.entries(with_ages=True))
    table.write_bytes(TABLE)
    assert sum(map(len, reader.entries(with_ages=True))) == len(LINES)
    reader.close()


def test_polling_goes_on_with_the_ages_it_had(table: Path) -> None:
    """A poll that breaks off is an error; the next one that does not, has all ages."""
    with contextlib.closing(
        PollingSource(SocketTables([ProcfsReader(namespaces.OWN)]), interval_s=0.001)
    ) as source:
        source.start()
        before = ages(source)
        assert len(before) == 3
        for torn in (TABLE[:-30], TABLE + b"x\n", b""):
            table.write_bytes(torn)
            eventually(lambda: not works(source))
            table.write_bytes(TABLE)
            eventually(lambda: works(source))
            assert ages(source) == before


def ages(source: PollingSource) -> dict[int, int]:
    (found,) = source.read()
    return {int(each["key"]["remote_port"]): int(each["established_ns"]) for each in found}


def works(source: PollingSource) -> bool:
    try:
        list(source.read())
    except SourceError:
        return False
    return True
