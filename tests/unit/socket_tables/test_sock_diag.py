# SPDX-License-Identifier: GPL-3.0-only
"""Dumps over a netlink socket, whole ones and ones that break off."""

import contextlib
import socket
import struct
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
    dumps = DumpSocket(cast("socket.socket", opened))
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
    found = [len(rows) for rows in dumps.dump(STATES, 0)]
    assert found == [*sizes, 1]


def test_an_end_that_never_comes_is_waited_for_once() -> None:
    """Nor is the exporter stuck with a dump whose end was lost."""
    opened = Datagrams([diag_message(443, sequence=1)])
    dumps = DumpSocket(cast("socket.socket", opened))
    assert "timed out" in refusal(dumps)
    assert "timed out" in refusal(dumps)
    opened.send_later(whole(2))
    assert ports(dumps) == [443, 80]


def test_an_abandoned_dump_does_not_disturb_the_next() -> None:
    """The kernel's remaining answers to it are read, and passed over."""
    with Peers() as peers:
        peers.connect(3)
        reader = SockDiagReader(namespaces.OWN)
        next(reader.listening())
        found = np.concatenate(list(reader.entries(with_ages=True)))
        reader.close()
        at_port = found[found["key"]["local_port"] == peers.port]
        assert sorted(at_port["state"]) == [SS_ESTABLISHED] * 3 + [SS_LISTEN]
        assert (at_port["key"]["netns"] == namespaces.inode()).all()


def test_the_kernel_goes_on_after_a_dump_that_was_given_up() -> None:
    """It refuses another while one is under way (EBUSY): what is left is read first."""
    with Peers() as peers:
        peers.connect(307)
        reader = SockDiagReader(namespaces.OWN)
        # So that the kernel cannot be ahead of what is read.
        reader._for_entries._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(sock_diag, "REPLY_BYTES", sock_diag.DATAGRAM_BYTES)
            with contextlib.closing(reader.entries(with_ages=True)) as given_up:  # type: ignore[type-var]
                next(given_up)
        found = np.concatenate(list(reader.entries(with_ages=True)))
        reader.close()
    at_port = found[found["key"]["local_port"] == peers.port]
    assert np.count_nonzero(at_port["state"] == SS_ESTABLISHED) == 307
