# SPDX-License-Identifier: GPL-3.0-only
"""Complete and incomplete dumps over a netlink socket."""

import contextlib
import errno
import itertools
import os
import socket
import struct
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, SS_ESTABLISHED, SS_LISTEN

from tcpexporter.errors import SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import sock_diag
from tcpexporter.socket_tables.diag_messages import FEW, decode_messages
from tcpexporter.socket_tables.sock_diag import DumpSocket, SockDiagReader
from tests.fuzz.targets import Datagrams
from tests.support import Peers
from tests.unit.socket_tables.samples import attribute, diag_message, message

STATES = 1 << SS_ESTABLISHED | 1 << SS_LISTEN


def done(sequence: int) -> bytes:
    return message(NLMSG_DONE, bytes(4), sequence=sequence)


def sent(*datagrams: bytes) -> DumpSocket:
    return DumpSocket(cast("socket.socket", Datagrams(datagrams)))


def ports(dumps: DumpSocket) -> list[int]:
    return [
        int(port)
        for rows in dumps.dump(STATES, 0)
        for port in decode_messages(rows, 1)["key"]["local_port"]
    ]


def refusal(dumps: DumpSocket) -> str:
    with pytest.raises(SocketTableError) as caught:
        ports(dumps)
    return str(caught.value)


def complete(first: int, *, ports: tuple[int, int] = (443, 80)) -> list[bytes]:
    """Return a complete dump of each address family, from the sequence number ``first``."""
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
def test_answers_to_another_request_are_ignored(stale: bytes) -> None:
    """Sockets, the end or an error of an abandoned dump do not belong to the next one."""
    assert ports(sent(stale, *complete(1))) == [443, 80]


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
def test_an_incomplete_dump_is_an_error(datagrams: list[bytes], reason: str) -> None:
    """The error has the offset. The next dump ignores the rest of the failed one."""
    end = [] if datagrams[-1].endswith(done(1)) and "no end" not in reason else [done(1)]
    opened = Datagrams(datagrams)
    dumps = DumpSocket(cast("socket.socket", opened))
    with pytest.raises(SocketTableError, match=reason):
        ports(dumps)
    opened.send_later([diag_message(80, sequence=1), *end, *complete(2)])
    assert ports(dumps) == [443, 80]


def test_runs_have_the_right_length() -> None:
    """They are shorter than the number of messages that is compared first, about as
    long, or longer."""
    sizes = [FEW - 1, FEW, FEW + 1, 1, 7 * FEW, 2, FEW]
    messages = [
        diag_message(number, *[attribute(8, bytes(4))] * (number % 2), sequence=1) * size
        for number, size in enumerate(sizes)
    ]
    (second,) = complete(2)[:1]
    dumps = sent(b"".join(messages) + done(1), second)
    found = [len(rows) for rows in dumps.dump(STATES, 0)]
    assert found == [*sizes, 1]


def test_a_missing_end_is_awaited_only_once() -> None:
    """The exporter can dump again after the end of a dump was lost."""
    opened = Datagrams([diag_message(443, sequence=1)])
    dumps = DumpSocket(cast("socket.socket", opened))
    assert "timed out" in refusal(dumps)
    assert "timed out" in refusal(dumps)
    opened.send_later(complete(2))
    assert ports(dumps) == [443, 80]


@pytest.mark.parametrize("opened", range(2))
def test_a_socket_that_cannot_be_opened_leaves_no_descriptor_open(
    opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has too many open files before or after the first of two sockets."""
    numbers = itertools.count()
    open_socket = sock_diag._netlink_socket

    def limited() -> socket.socket:
        if next(numbers) == opened:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_socket()

    before = {*Path("/proc/self/fd").iterdir()}
    monkeypatch.setattr(sock_diag, "_netlink_socket", limited)
    # The error refers to the reader: it is not deleted before the assertion.
    with pytest.raises(SocketTableError, match="Too many open files") as caught:
        SockDiagReader(namespaces.OWN)
    assert {*Path("/proc/self/fd").iterdir()} == before, caught


def test_an_abandoned_dump_does_not_affect_the_next() -> None:
    """Its remaining messages are read and ignored."""
    with Peers() as peers:
        peers.connect(3)
        reader = SockDiagReader(namespaces.OWN)
        next(reader.entries(with_ages=False))
        found = np.concatenate(list(reader.entries(with_ages=True)))
        reader.close()
        at_port = found[found["key"]["local_port"] == peers.port]
        assert sorted(at_port["state"]) == [SS_ESTABLISHED] * 3 + [SS_LISTEN]
        assert (at_port["key"]["netns"] == namespaces.inode()).all()


def test_the_kernel_accepts_a_dump_after_an_abandoned_one() -> None:
    """It refuses a dump while one is in progress (EBUSY), so the rest is read first."""
    with Peers() as peers:
        peers.connect(307)
        reader = SockDiagReader(namespaces.OWN)
        # A small buffer keeps the kernel from sending the whole dump at once.
        reader._for_entries._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(sock_diag, "REPLY_BYTES", sock_diag.DATAGRAM_BYTES)
            with contextlib.closing(reader.entries(with_ages=True)) as abandoned:  # type: ignore[type-var]
                next(abandoned)
        found = np.concatenate(list(reader.entries(with_ages=True)))
        reader.close()
    at_port = found[found["key"]["local_port"] == peers.port]
    assert np.count_nonzero(at_port["state"] == SS_ESTABLISHED) == 307
