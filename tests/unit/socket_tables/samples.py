# SPDX-License-Identifier: GPL-3.0-only
"""Captured and constructed sockets for tests of the socket tables."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pyroute2.netlink import NLMSG_DONE
from pyroute2.netlink.diag import (
    SOCK_DIAG_BY_FAMILY,
    SS_CLOSE_WAIT,
    SS_ESTABLISHED,
    SS_FIN_WAIT2,
    SS_LISTEN,
)

from tcpexporter.connections.record import Records
from tcpexporter.socket_tables.diag_messages import decode_messages, split_messages
from tcpexporter.socket_tables.entries import ENTRY, Bytes
from tcpexporter.socket_tables.procfs import decode_lines
from tests.unit.data.capture import SEQUENCE

DATA = Path(__file__).parents[1] / "data"
NETNS = 0x0BADCAFE
SO_COOKIE = 57
"""include/uapi/asm-generic/socket.h"""

IPV4, IPV4_CLIENT, IPV4_ANY = "::ffff:192.0.2.1", "::ffff:192.0.2.77", "::ffff:0.0.0.0"
IPV6 = "2001:db8:102:304:506:708:90a:b0c"
IPV6_CLIENT = "2001:db8:f0e0:d0c0:b0a0:9080:7060:5040"

KNOWN_KEYS = {
    # 192.0.2.1:8001 and its client, port 40001
    bytes.fromhex("00000000000000000000ffff c0000201 00000000000000000000ffff c000024d")
    + struct.pack("=IHH", NETNS, 8001, 40001),
    # [2001:db8:...]:8003 and its client, port 40004
    bytes.fromhex("20010db80102030405060708090a0b0c 20010db8f0e0d0c0b0a0908070605040")
    + struct.pack("=IHH", NETNS, 8003, 40004),
    # [::]:8005 and its IPv4 client, port 40006
    bytes.fromhex("00000000000000000000ffff c0000201 00000000000000000000ffff c000024d")
    + struct.pack("=IHH", NETNS, 8005, 40006),
    # the client of port 40011, an IPv6 socket with IPv4 addresses
    bytes.fromhex("00000000000000000000ffff c000024d 00000000000000000000ffff c0000201")
    + struct.pack("=IHH", NETNS, 40011, 8001),
}

SOURCES = ("sock_diag", "procfs")


class Socket(NamedTuple):
    """A socket in a form that does not depend on the kind of table."""

    local: str
    local_port: int
    remote: str
    remote_port: int
    state: int

    def other_end(self, state: int) -> "Socket":
        return Socket(self.remote, self.remote_port, self.local, self.local_port, state)


def captured_sockets() -> set[Socket]:
    """Return the sockets that tests/unit/data/capture.py opened."""
    listeners = {
        Socket(IPV4, 8001, IPV4_ANY, 0, SS_LISTEN),
        Socket(IPV4_ANY, 8002, IPV4_ANY, 0, SS_LISTEN),
        Socket(IPV6, 8003, "::", 0, SS_LISTEN),
        Socket("::", 8004, "::", 0, SS_LISTEN),
        Socket("::", 8005, "::", 0, SS_LISTEN),
    }
    connected = {
        Socket(*ends, SS_ESTABLISHED)
        for ends in (
            *((IPV4, 8001, IPV4_CLIENT, port) for port in (40001, 40002, 40003, 40011)),
            *((IPV6, 8003, IPV6_CLIENT, port) for port in (40004, 40005)),
            *((IPV4, 8005, IPV4_CLIENT, port) for port in range(40006, 40011)),
        )
    }
    half_closed = Socket(IPV4, 8001, IPV4_CLIENT, 40012, SS_CLOSE_WAIT)
    return (
        listeners
        | connected
        | {each.other_end(SS_ESTABLISHED) for each in connected}
        | {half_closed, half_closed.other_end(SS_FIN_WAIT2)}
    )


def sockets_of(chunks: Iterator[Records]) -> list[Socket]:
    """Return entries in a form that can be compared."""

    def address(octets: Bytes) -> str:
        return socket.inet_ntop(socket.AF_INET6, octets.tobytes())

    return [
        Socket(
            address(entry["key"]["local_address"]),
            int(entry["key"]["local_port"]),
            address(entry["key"]["remote_address"]),
            int(entry["key"]["remote_port"]),
            int(entry["state"]),
        )
        for chunk in chunks
        for entry in chunk
    ]


def captured(name: str) -> Bytes:
    """Read a file that tests/unit/data/capture.py wrote."""
    return np.fromfile(DATA / name, np.uint8)


class CapturedReader:
    """Reads the captured sockets, in several chunks."""

    netns = NETNS

    def __init__(self, name: str) -> None:
        self.name = name

    def everything(self) -> Iterator[Records]:
        if self.name == "sock_diag":
            for name in ("diag-inet-0.bin", "diag-inet6-0.bin"):
                for rows in split_messages(captured(name), SEQUENCE)[0]:
                    yield decode_messages(rows, NETNS)
        else:
            for name, words in (("tcp", 1), ("tcp6", 4)):
                _, *lines = captured(f"proc-net-{name}.txt").tobytes().splitlines(True)
                for start in range(0, len(lines), 5):
                    yield decode_lines(b"".join(lines[start : start + 5]), words, NETNS)

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002
        for each in self.everything():
            yield each[np.isin(each["state"], (SS_ESTABLISHED, SS_LISTEN))]

    def listening(self) -> Iterator[Records]:
        for each in self.everything():
            yield each[each["state"] == SS_LISTEN]

    def close(self) -> None:
        pass


class MadeReader:
    """Returns sockets of one network namespace that a test defines."""

    name = "made"

    def __init__(self, netns: int, *rows: tuple[int, int]) -> None:
        """Define IPv4 sockets, each by its local port and its state."""
        self.netns = netns
        self._rows = np.zeros(len(rows), ENTRY)
        self._rows["key"]["netns"] = netns
        self._rows["key"]["local_address"][:, 10:12] = 0xFF
        self._rows["key"]["local_port"] = [port for port, _ in rows]
        self._rows["state"] = [state for _, state in rows]
        self.closed = False

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002
        for row in range(len(self._rows)):
            yield self._rows[row : row + 1]

    def listening(self) -> Iterator[Records]:
        yield self._rows[self._rows["state"] == SS_LISTEN]

    def close(self) -> None:
        self.closed = True


def message(kind: int, payload: bytes, *, sequence: int = SEQUENCE) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 2, sequence, 4711) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    padding = bytes(-len(payload) % 4)
    return struct.pack("=HH", 4 + len(payload), kind) + payload + padding


def diag_message(
    port: int, *attributes: bytes, sequence: int = SEQUENCE, state: int = SS_LISTEN
) -> bytes:
    """Return the message for a socket at 127.0.0.1."""
    socket_id = struct.pack(">HH", port, 0) + b"\x7f\0\0\1".ljust(32, b"\0") + bytes(12)
    payload = struct.pack("=BBBB", socket.AF_INET, state, 0, 0) + socket_id + bytes(20)
    return message(SOCK_DIAG_BY_FAMILY, payload + b"".join(attributes), sequence=sequence)


DONE = message(NLMSG_DONE, bytes(4))


def decode(reply: bytes) -> tuple[list[Bytes], bool]:
    return split_messages(np.frombuffer(reply, np.uint8), SEQUENCE)
