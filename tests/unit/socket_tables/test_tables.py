# SPDX-License-Identifier: GPL-3.0-only
"""The kernel's socket tables, from bytes that tests/unit/data/capture.py captured."""

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import (
    SOCK_DIAG_BY_FAMILY,
    SS_CLOSE_WAIT,
    SS_ESTABLISHED,
    SS_FIN_WAIT2,
    SS_LISTEN,
)

from tcpexporter.connections.record import Direction, Records, directions
from tcpexporter.errors import SettingsError, SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import tables as sockets
from tcpexporter.socket_tables.tables import (
    DIAG_MESSAGE,
    ENTRY,
    INET_DIAG_INFO,
    INET_DIAG_SKV6ONLY,
    JIFFY_NS,
    TCPI_OPT_SYN_DATA,
    Bytes,
    ProcfsReader,
    Reader,
    SockDiagReader,
    SocketTables,
    decode_procfs,
    decode_sock_diag,
    open_tables,
    sock_diag_request,
)
from tests.support import Peers
from tests.unit.data.capture import FAMILY_WITHOUT_DIAG, SEQUENCE

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


class Told(NamedTuple):
    """A socket."""

    local: str
    local_port: int
    remote: str
    remote_port: int
    state: int

    def other_end(self, state: int) -> "Told":
        return Told(self.remote, self.remote_port, self.local, self.local_port, state)


def opened() -> set[Told]:
    """What capture.py opened."""
    listeners = {
        Told(IPV4, 8001, IPV4_ANY, 0, SS_LISTEN),
        Told(IPV4_ANY, 8002, IPV4_ANY, 0, SS_LISTEN),
        Told(IPV6, 8003, "::", 0, SS_LISTEN),
        Told("::", 8004, "::", 0, SS_LISTEN),
        Told("::", 8005, "::", 0, SS_LISTEN),
    }
    connected = {
        Told(*ends, SS_ESTABLISHED)
        for ends in (
            *((IPV4, 8001, IPV4_CLIENT, port) for port in (40001, 40002, 40003, 40011)),
            *((IPV6, 8003, IPV6_CLIENT, port) for port in (40004, 40005)),
            *((IPV4, 8005, IPV4_CLIENT, port) for port in range(40006, 40011)),
        )
    }
    half_closed = Told(IPV4, 8001, IPV4_CLIENT, 40012, SS_CLOSE_WAIT)
    return (
        listeners
        | connected
        | {each.other_end(SS_ESTABLISHED) for each in connected}
        | {half_closed, half_closed.other_end(SS_FIN_WAIT2)}
    )


def told(chunks: Iterator[Records]) -> list[Told]:
    def address(octets: Bytes) -> str:
        return socket.inet_ntop(socket.AF_INET6, octets.tobytes())

    return [
        Told(
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
    return np.fromfile(DATA / name, np.uint8)


class CapturedReader:
    """What was captured, in several chunks."""

    netns = NETNS

    def __init__(self, name: str) -> None:
        self.name = name

    def everything(self) -> Iterator[Records]:
        if self.name == "sock_diag":
            for name in ("diag-inet-0.bin", "diag-inet6-0.bin"):
                for rows in decode_sock_diag(captured(name), SEQUENCE)[0]:
                    yield sockets._diag_entries(rows, NETNS)
        else:
            for name, words in (("tcp", 1), ("tcp6", 4)):
                _, *lines = captured(f"proc-net-{name}.txt").tobytes().splitlines(True)
                for start in range(0, len(lines), 5):
                    yield decode_procfs(b"".join(lines[start : start + 5]), words, NETNS)

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002
        for each in self.everything():
            yield each[np.isin(each["state"], (SS_ESTABLISHED, SS_LISTEN))]

    def listening(self) -> Iterator[Records]:
        for each in self.everything():
            yield each[each["state"] == SS_LISTEN]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", SOURCES)
def test_every_socket_is_told_of_once(name: str) -> None:
    """Both tables give the addresses, ports and states of all that was captured."""
    found = told(CapturedReader(name).everything())
    assert len(found) == len(set(found))
    assert set(found) == opened()


@pytest.mark.parametrize("name", SOURCES)
def test_keys_are_those_of_the_bpf_program(name: str) -> None:
    """Addresses lie in network order, the rest in host order; joining keeps that."""
    keys = SocketTables([CapturedReader(name)]).established()["key"]
    assert len(keys) == 22
    assert {key.tobytes() for key in keys} >= KNOWN_KEYS


def test_both_tables_give_the_same_keys() -> None:
    """A connection has the same key, to the byte, whichever table it comes from."""
    by_diag, by_procfs = (
        {key.tobytes() for key in SocketTables([CapturedReader(name)]).established()["key"]}
        for name in SOURCES
    )
    assert by_diag == by_procfs


@pytest.mark.parametrize("name", SOURCES)
def test_connections_have_a_direction_and_a_time(name: str) -> None:
    """Inbound is what has a listener at its local port; all are of when they were seen."""
    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    found = SocketTables([CapturedReader(name)]).established()
    after_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    is_inbound = directions(found["group"]) == Direction.INBOUND
    assert (
        sorted(found["key"]["local_port"][is_inbound])
        == [8001] * 4 + [8003] * 2 + [8005] * 5
    )
    is_outbound = directions(found["group"]) == Direction.OUTBOUND
    assert sorted(found["key"]["local_port"][is_outbound]) == list(range(40001, 40012))
    assert (found["established_ns"] >= before_ns).all()
    assert (found["established_ns"] <= after_ns).all()
    assert len(np.unique(found["handle"])) == (1 if name == "procfs" else len(found))
    assert not found["pad"].any()


@pytest.mark.parametrize(
    ("name", "not_told"),
    [("sock_diag", set()), ("procfs", {(8004, 4)})],  # procfs does not tell what is v6only
)
def test_listeners_are_of_the_ip_versions_they_accept(
    name: str, not_told: set[tuple[int, int]]
) -> None:
    """:: accepts both versions unless it is v6only, an address accepts its own."""
    listeners = SocketTables([CapturedReader(name)]).listeners()
    assert (listeners["netns"] == NETNS).all()
    assert [(int(port), int(version)) for _, port, version in listeners.tolist()] == sorted(
        {(8001, 4), (8002, 4), (8003, 6), (8004, 6), (8005, 4), (8005, 6)} | not_told
    )


class MadeReader:
    """What a test made, of one network namespace."""

    name = "made"

    def __init__(self, netns: int, *rows: tuple[int, int]) -> None:
        """Of IPv4 sockets the local port and the state."""
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


def test_a_listener_is_one_of_its_namespace() -> None:
    """A listener makes inbound what is in its namespace, whichever is told first."""
    here = MadeReader(1, (443, SS_ESTABLISHED), (443, SS_LISTEN), (443, SS_ESTABLISHED))
    there = MadeReader(2, (443, SS_ESTABLISHED), (80, SS_LISTEN))
    found = SocketTables([here, there]).established()
    assert found["key"]["netns"].tolist() == [1, 1, 2]
    assert directions(found["group"]).tolist() == [
        Direction.INBOUND,
        Direction.INBOUND,
        Direction.OUTBOUND,
    ]


def test_listeners_are_not_repeated() -> None:
    """SO_REUSEPORT has many sockets listen on one port: it is told of once."""
    here = MadeReader(1, *[(443, SS_LISTEN)] * 3, (80, SS_LISTEN))
    there = MadeReader(2, (443, SS_LISTEN))
    listeners = SocketTables([here, there]).listeners()
    assert listeners.tolist() == [(1, 80, 4), (1, 443, 4), (2, 443, 4)]


def test_tables_without_sockets_are_empty() -> None:
    """No connection and no listener are arrays of the right kind, of length 0."""
    tables = SocketTables([MadeReader(1)])
    assert tables.established()["established_ns"].tolist() == []
    assert tables.listeners()["port"].tolist() == []


def test_closing_tables_closes_all_readers() -> None:
    """No namespace's descriptors are left."""
    readers = [MadeReader(netns) for netns in (1, 2, 3)]
    SocketTables(readers).close()
    assert all(reader.closed for reader in readers)


# --- sock_diag ---


def message(kind: int, payload: bytes, *, sequence: int = SEQUENCE) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 2, sequence, 4711) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    padding = bytes(-len(payload) % 4)
    return struct.pack("=HH", 4 + len(payload), kind) + payload + padding


def diag_message(
    port: int, *attributes: bytes, sequence: int = SEQUENCE, state: int = SS_LISTEN
) -> bytes:
    """A socket at 127.0.0.1."""
    socket_id = struct.pack(">HH", port, 0) + b"\x7f\0\0\1".ljust(32, b"\0") + bytes(12)
    payload = struct.pack("=BBBB", socket.AF_INET, state, 0, 0) + socket_id + bytes(20)
    return message(SOCK_DIAG_BY_FAMILY, payload + b"".join(attributes), sequence=sequence)


DONE = message(NLMSG_DONE, bytes(4))


def decode(reply: bytes) -> tuple[list[Bytes], bool]:
    return decode_sock_diag(np.frombuffer(reply, np.uint8), SEQUENCE)


def ports(runs: list[Bytes]) -> list[list[int]]:
    return [sockets._diag_entries(rows, 0)["key"]["local_port"].tolist() for rows in runs]


def test_the_request_is_what_the_kernel_takes() -> None:
    """A dump request of 72 bytes: the kernel sent ours back when it refused it."""
    echoed = captured("diag-error.bin")[20:].tobytes()
    assert sock_diag_request(FAMILY_WITHOUT_DIAG, 0xFFF, 0, SEQUENCE) == echoed
    assert len(echoed) == 72
    states = 1 << SS_ESTABLISHED | 1 << SS_LISTEN
    assert sock_diag_request(socket.AF_INET6, states, 2, 258) == struct.pack(
        "=IHHIIBBBBI48x", 72, 20, 0x301, 258, 0, 10, 6, 2, 0, 0x402
    )


def test_done_finishes_a_dump() -> None:
    """Alone, as captured, or after the last messages."""
    assert decode(captured("diag-inet-1.bin").tobytes()) == ([], True)
    runs, finished = decode(diag_message(443) + DONE)
    assert (ports(runs), finished) == ([[443]], True)


def test_a_dump_that_fails_is_not_an_empty_one() -> None:
    """Without tcp_diag the kernel ends a dump with DONE and ENOENT: nothing is known."""
    with pytest.raises(SocketTableError, match="No such file or directory"):
        decode(message(NLMSG_DONE, struct.pack("=i", -2)))


def test_what_is_not_an_answer_is_malformed() -> None:
    """Another type or request, what is not aligned, an error number out of range."""
    for reply in (
        diag_message(443, sequence=SEQUENCE - 1),
        message(1, bytes(100)),
        struct.pack("=IHHII", 89, SOCK_DIAG_BY_FAMILY, 2, SEQUENCE, 0) + bytes(73),
        message(NLMSG_ERROR, struct.pack("=i", -(2**31))),
    ):
        with pytest.raises(SocketTableError):
            decode(reply)


def test_a_dump_goes_on_until_done() -> None:
    """A datagram without DONE is not the last."""
    assert not decode(captured("diag-inet-0.bin").tobytes())[1]
    assert not decode(b"")[1]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (captured("diag-error.bin").tobytes(), "No such file or directory"),
        (message(NLMSG_ERROR, struct.pack("=i", -16)), "Device or resource busy"),
        (diag_message(443) + message(NLMSG_ERROR, struct.pack("=i", -12)), "memory"),
    ],
)
def test_an_error_is_told_by_its_name(reply: bytes, reason: str) -> None:
    """What the kernel refuses is an error with the kernel's reason."""
    with pytest.raises(SocketTableError, match=f"sock_diag refuses: .*{reason}"):
        decode(reply)


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


@pytest.mark.parametrize("name", SOURCES)
def test_listeners_are_read_while_a_look_is_taken(name: str) -> None:
    """A scrape in the middle of a look: both are whole, and neither waits for the other."""
    with Peers() as peers:
        peers.connect(3)
        reader: Reader = (SockDiagReader if name == "sock_diag" else ProcfsReader)(
            namespaces.OWN
        )
        look = reader.entries(with_ages=True)
        found = [next(look).copy()]
        assert sum(len(chunk) for chunk in reader.listening()) >= 1
        found += [chunk.copy() for chunk in look]
        reader.close()
    here = [chunk[chunk["key"]["local_port"] == peers.port] for chunk in found]
    assert sum(len(chunk) for chunk in here) == 4


def test_messages_of_different_lengths_lie_in_one_datagram() -> None:
    """Runs of equally long messages come out in the order in which they lie there."""
    long = attribute(8, bytes(4))
    reply = b"".join(
        [
            *(diag_message(port) for port in (1, 2, 3)),
            *(diag_message(port, long) for port in (4, 5)),
            diag_message(6),
            diag_message(7, long, long),
            *(diag_message(port, long) for port in (8, 9, 10, 11, 12)),
        ]
    )
    runs, finished = decode(reply)
    assert ports(runs) == [[1, 2, 3], [4, 5], [6], [7], [8, 9, 10, 11, 12]]
    assert [rows.shape[1] for rows in runs] == [88, 96, 88, 104, 96]
    assert not finished


def test_a_length_is_rounded_up_to_four() -> None:
    """The next message begins at the next multiple of four: netlink(7), NLMSG_ALIGN."""
    odd = diag_message(443, attribute(INET_DIAG_SKV6ONLY, b"\1"))
    reply = struct.pack("=I", len(odd) - 3) + odd[4:]
    runs, finished = decode(reply + reply + DONE)
    assert (ports(runs), finished) == ([[443, 443]], True)


@pytest.mark.parametrize("name", ["diag-inet-0.bin", "diag-inet6-0.bin"])
def test_a_reply_cut_anywhere_is_refused(name: str) -> None:
    """Unless cut between two messages; the error names where the torn one begins."""
    whole = captured(name)
    starts = list(starts_of(whole.tobytes()))
    assert len(starts) > 11
    for size in range(1, len(whole)):
        if size in starts:
            assert not decode_sock_diag(whole[:size], SEQUENCE)[1]
            continue
        start = max(each for each in starts if each < size)
        with pytest.raises(SocketTableError, match=rf"malformed message at byte {start}$"):
            decode_sock_diag(whole[:size], SEQUENCE)


def starts_of(reply: bytes) -> Iterator[int]:
    start = 0
    while start < len(reply):
        yield start
        start += int.from_bytes(reply[start : start + 4], sys.byteorder)


@pytest.mark.parametrize(
    ("length", "complaint"),
    [
        (0, "malformed"),
        (15, "malformed"),
        (19, "malformed"),
        (20, "short"),
        (DIAG_MESSAGE.itemsize - 1, "short"),
        (DIAG_MESSAGE.itemsize + len(DONE) + 1, "malformed"),
        (2**32 - 1, "malformed"),
    ],
)
def test_a_wrong_length_is_refused(length: int, complaint: str) -> None:
    """One that leaves no room for the fields, or goes past the end; says where."""
    wrong = struct.pack("=I", length) + diag_message(443)[4:]
    with pytest.raises(SocketTableError, match=rf"{complaint} message at byte 176$"):
        decode(diag_message(80) * 2 + wrong + DONE)


any_message = st.builds(
    lambda length, kind, sequence, payload: (
        struct.pack("=IHHII", length or 16 + len(payload), kind, 2, sequence, 0) + payload
    ),
    length=st.one_of(st.just(0), st.integers(0, 300)),
    kind=st.sampled_from([SOCK_DIAG_BY_FAMILY, NLMSG_DONE, NLMSG_ERROR, 0, 1, 4, 0xFFFF]),
    sequence=st.sampled_from([SEQUENCE, SEQUENCE, SEQUENCE, 0]),
    payload=st.integers(1, 30)
    .flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
    .filter(lambda payload: not payload.startswith(b"\0\0\0\x80")),
)


def decode_or_refuse(reply: Bytes) -> None:
    """Take it apart as the reader does, or raise SocketTableError and nothing else."""
    try:
        runs, _ = decode_sock_diag(reply, SEQUENCE)
    except SocketTableError:
        return
    for rows in runs:
        sockets._diag_entries(rows, NETNS)


@settings(deadline=None)
@given(reply=st.one_of(st.binary(), st.lists(any_message, max_size=7).map(b"".join)))
def test_any_reply_is_decoded_or_refused(reply: bytes) -> None:
    """Whatever the bytes are, decoding ends, with SocketTableError or without."""
    decode_or_refuse(np.frombuffer(reply, np.uint8))


@settings(deadline=None)
@given(
    name=st.sampled_from(["diag-inet-0.bin", "diag-inet6-0.bin", "diag-error.bin"]),
    changes=st.dictionaries(st.integers(0, 2000), st.integers(0, 255), max_size=7),
)
def test_a_damaged_reply_is_decoded_or_refused(name: str, changes: dict[int, int]) -> None:
    """So is what was captured, with some bytes changed."""
    reply = captured(name)
    for place, byte in changes.items():
        reply[place % len(reply)] = byte
    decode_or_refuse(reply)


def v6only(*attributes: bytes) -> list[bool]:
    (rows,), _ = decode(diag_message(443, *attributes))
    found: list[bool] = sockets._diag_entries(rows, 0)["v6only"].tolist()
    return found


def test_an_attribute_is_found_wherever_it_is() -> None:
    """First, last or in the middle of others; not where it is missing."""
    yes, other = attribute(INET_DIAG_SKV6ONLY, b"\1"), attribute(8, b"\1\1\1\1\1")
    assert v6only(yes) == v6only(yes, other) == v6only(other, yes) == [True]
    assert v6only(other, other, yes, other) == [True]
    assert v6only() == v6only(other) == v6only(other, other) == [False]
    assert v6only(other, attribute(INET_DIAG_SKV6ONLY, b"\0")) == [False]
    assert v6only(other, attribute(INET_DIAG_SKV6ONLY, b"")) == [False]


def test_attributes_of_many_messages_are_walked_apart() -> None:
    """Messages of one length may have different attributes in different order."""
    yes, no, other = (
        attribute(INET_DIAG_SKV6ONLY, b"\1"),
        attribute(INET_DIAG_SKV6ONLY, b"\0"),
        attribute(8, bytes(4)),
    )
    messages = [(yes, other), (other, yes), (no, other), (other, no), (other, other)]
    (rows,), _ = decode(b"".join(diag_message(443, *each) for each in messages))
    entries = sockets._diag_entries(rows, 0)
    assert entries["v6only"].tolist() == [True, True, False, False, False]


@settings(deadline=None)
@given(data=st.lists(st.binary(min_size=24, max_size=24), min_size=1, max_size=7))
def test_any_attributes_are_walked_to_their_end(data: list[bytes]) -> None:
    """Lengths of 0 or past the end do no harm; an attribute's first byte is found."""
    rows = np.frombuffer(b"".join(diag_message(443, each) for each in data), np.uint8)
    has, payload = sockets._attribute(rows.reshape(len(data), -1), INET_DIAG_SKV6ONLY, 1)
    found = np.zeros(len(data), np.uint8)
    found[has] = payload[:, 0]
    assert found.tolist() == [first_byte(each, INET_DIAG_SKV6ONLY) for each in data]


def first_byte(attributes: bytes, kind: int) -> int:
    """What `_attribute` gives, one message at a time."""
    found = 0
    while len(attributes) >= 5:
        length, here = struct.unpack_from("=HH", attributes)
        if here == kind and length >= 5:
            found = attributes[4]
        attributes = attributes[max((length + 3) // 4 * 4, 4) :]
    return found


# --- procfs ---


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is opened instead of /proc/thread-self/net."""
    real_open = os.open

    def open_there(path: str, flags: int) -> int:
        return real_open(path.replace("/proc/thread-self/net", str(tmp_path)), flags)

    monkeypatch.setattr(os, "open", open_there)
    return tmp_path


def put(net: Path, *names: str) -> None:
    for name in names:
        (net / name).write_bytes(captured(f"proc-net-{name}.txt").tobytes())


def read_procfs() -> list[Told]:
    reader = ProcfsReader(namespaces.OWN)
    first, again = (
        told(reader.entries(with_ages=True)),
        told(reader.entries(with_ages=True)),
    )
    reader.close()
    assert first == again
    return first


def listening_or_established() -> set[Told]:
    return {each for each in opened() if each.state in (SS_LISTEN, SS_ESTABLISHED)}


def test_both_files_are_read_each_time_from_their_start(net: Path) -> None:
    """What is listening or established, of IPv4 and IPv6."""
    put(net, "tcp", "tcp6")
    found = read_procfs()
    assert len(found) == 27
    assert set(found) == listening_or_established()


@pytest.mark.parametrize("piece_bytes", [150, 151, 163, 307, 1009, 4096])
def test_lines_may_be_torn_between_pieces(
    net: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """A line that one read begins and another ends is one line."""
    monkeypatch.setattr(sockets, "PIECE_BYTES", piece_bytes)
    put(net, "tcp", "tcp6")
    assert set(read_procfs()) == listening_or_established()


def test_files_with_a_heading_only_are_empty(net: Path) -> None:
    """A namespace without sockets has no entries."""
    for name in ("tcp", "tcp6"):
        heading, _, _ = captured(f"proc-net-{name}.txt").tobytes().partition(b"\n")
        (net / name).write_bytes(heading + b"\n")
    assert read_procfs() == []


def test_a_kernel_without_ipv6_has_one_file(net: Path) -> None:
    """IPv4 alone is read, and nothing is complained of."""
    put(net, "tcp")
    assert {each.local for each in read_procfs()} == {IPV4, IPV4_ANY, IPV4_CLIENT}


def test_a_kernel_without_procfs_is_told_of(net: Path) -> None:
    """Without /proc/net/tcp there is nothing to read; the error names the file."""
    with pytest.raises(SocketTableError, match=f"cannot open {net}/tcp: No such file"):
        ProcfsReader(namespaces.OWN)


def test_procfs_tells_listeners_alone(net: Path) -> None:
    """`listening` leaves connections out."""
    put(net, "tcp", "tcp6")
    reader = ProcfsReader(namespaces.OWN)
    found = told(reader.listening())
    reader.close()
    assert {each.local_port for each in found} == {8001, 8002, 8003, 8004, 8005}
    assert len(found) == 5


def line(number: int, port: int, rest: str = " 00000000:00000000 00:00000000") -> bytes:
    """One of /proc/net/tcp: a client of 127.0.0.1."""
    address = f"{int.from_bytes(bytes([127, 0, 0, 1]), sys.byteorder):08X}"
    return f"{number:4d}: {address}:{port:04X} {address}:9C41 01{rest}\n".encode()


@pytest.mark.parametrize("numbers", [(0, 1, 2), (9998, 9999, 10000), (7, 123456, 10**9)])
def test_the_first_column_may_be_wide(numbers: Sequence[int]) -> None:
    """From 10,000 sockets on it takes more than four characters."""
    text = b"".join(line(number, 443 + place) for place, number in enumerate(numbers))
    entries = decode_procfs(text, 1, NETNS)
    assert entries["key"]["local_port"].tolist() == [443, 444, 445]
    assert entries["key"]["remote_port"].tolist() == [40001] * 3
    assert entries["key"]["local_address"][:, -4:].tolist() == [[127, 0, 0, 1]] * 3
    assert entries["state"].tolist() == [SS_ESTABLISHED] * 3
    assert not entries["v6only"].any()


def test_columns_after_the_state_are_not_read() -> None:
    """A kernel may leave them out or say something else there."""
    text = line(0, 443, "") + line(1, 444, " one:two :three") + line(2, 445, ":")
    entries = decode_procfs(text, 1, NETNS)
    assert entries["key"]["local_port"].tolist() == [443, 444, 445]


def test_a_short_line_is_refused() -> None:
    """Cut anywhere before the end of its state; the error names its first byte."""
    whole = line(1, 443)
    needed = whole.index(b" 01") + len(" 01")
    for size in range(needed):
        text = line(0, 80) + whole[:size] + b"\n" + line(2, 8080)
        start = len(line(0, 80))
        with pytest.raises(SocketTableError, match=rf"short line at byte {start}$"):
            decode_procfs(text, 1, NETNS)


@pytest.mark.parametrize("bad", [b"G", b"a", b" ", b":", b"\0", b"\xff", b"-"])
def test_a_malformed_line_is_refused(bad: bytes) -> None:
    """No digit where one belongs, whichever; the error names the line's first byte."""
    whole = line(1, 443)
    start = len(line(0, 80))
    first, end = whole.index(b": ") + 2, whole.index(b" 01") + 3
    for place in range(first, end):
        if whole[place : place + 1] in b" :" and bad in b" :":
            continue
        text = line(0, 80) + whole[:place] + bad + whole[place + 1 :] + line(2, 8080)
        with pytest.raises(SocketTableError, match=rf"malformed line at byte {start}$"):
            decode_procfs(text, 1, NETNS)


@pytest.mark.parametrize("words", [1, 4])
def test_the_other_file_is_refused(words: int) -> None:
    """Lines of tcp are none of tcp6, nor the other way round."""
    name = {1: "tcp6", 4: "tcp"}[words]
    _, _, lines = captured(f"proc-net-{name}.txt").tobytes().partition(b"\n")
    with pytest.raises(SocketTableError, match=r"at byte 0$"):
        decode_procfs(lines, words, NETNS)


nearly_lines = st.lists(
    st.one_of(
        st.builds(line, st.integers(0, 99999), st.integers(0, 65535)),
        st.text(" :\n0AF", max_size=80).map(str.encode),
        st.binary(max_size=40),
    ),
    max_size=7,
).map(b"".join)


@settings(deadline=None)
@given(text=st.one_of(st.binary(), nearly_lines), words=st.sampled_from([1, 4]))
def test_any_text_is_decoded_or_refused(text: bytes, words: int) -> None:
    """Whatever the bytes are, decoding ends, with SocketTableError or without."""
    try:
        entries = decode_procfs(text, words, NETNS)
    except SocketTableError:
        return
    assert len(entries) == text.count(b"\n")


# --- both ---

any_entry = st.tuples(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65535),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65535),
    st.integers(1, 12),
)


@settings(deadline=None)
@given(entries=st.lists(any_entry, max_size=7), is_ipv4=st.booleans())
def test_both_decoders_give_back_what_was_written(
    entries: list[tuple[bytes, int, bytes, int, int]], *, is_ipv4: bool
) -> None:
    """Any addresses, ports and states come out of either form as they went in."""
    size, words = (4, 1) if is_ipv4 else (16, 4)
    prefix = b"\0" * 10 + b"\xff" * 2 if is_ipv4 else b""
    expected = [
        prefix
        + local[:size]
        + prefix
        + remote[:size]
        + struct.pack("=IHHBBqQ", NETNS, *rest)
        for local, port, remote, other, state in entries
        for rest in [(port, other, state, 0, 0, 0)]
    ]
    family = socket.AF_INET if is_ipv4 else socket.AF_INET6
    reply = b"".join(
        message(
            SOCK_DIAG_BY_FAMILY,
            struct.pack("=BBH", family, state, 0)
            + struct.pack(">HH", port, other)
            + local[:size].ljust(16, b"\0")
            + remote[:size].ljust(16, b"\0")
            + bytes(32),
        )
        for local, port, remote, other, state in entries
    )
    runs, _ = decode(reply)
    by_diag = [entry for rows in runs for entry in sockets._diag_entries(rows, NETNS)]
    assert [entry.tobytes() for entry in by_diag] == expected
    text = "".join(
        f"{number:4d}: {hexadecimal(local[:size])}:{port:04X}"
        f" {hexadecimal(remote[:size])}:{other:04X} {state:02X} \n"
        for number, (local, port, remote, other, state) in enumerate(entries)
    )
    by_procfs = decode_procfs(text.encode(), words, NETNS)
    assert [entry.tobytes() for entry in by_procfs] == expected


def hexadecimal(address: bytes) -> str:
    """As the kernel prints it: each word as the number that it is to this host."""
    words = struct.unpack(f"={len(address) // 4}I", address)
    return "".join(f"{word:08X}" for word in words)


@pytest.mark.parametrize("name", SOURCES)
def test_this_kernel_answers(name: str) -> None:
    """Each kind of table finds a connection that is there now, without root."""
    with Peers() as peers:
        peers.connect(3)
        tables = open_tables(name, "self")
        found = tables.established()
        listeners = tables.listeners()
        tables.close()
    assert tables.name == name
    at_port = found[found["key"]["local_port"] == peers.port]
    assert directions(at_port["group"]).tolist() == [Direction.INBOUND] * 3
    assert (namespaces.inode(), peers.port, 4) in listeners.tolist()


@pytest.mark.parametrize("name", SOURCES)
def test_a_socket_is_told_by_its_cookie(name: str) -> None:
    """It is that which the socket's owner is told: socket(7), SO_COOKIE."""
    with Peers() as peers:
        peers.connect(7)
        owners = {
            server.getpeername()[1]: server.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
            for _, server in peers.pairs
        }
        tables = open_tables(name, "self")
        found = tables.established(with_ages=False)
        tables.close()
    for each in found[found["key"]["local_port"] == peers.port]:
        told = owners[int(each["key"]["remote_port"])] if name == "sock_diag" else bytes(8)
        assert each["handle"].tobytes() == told


class NoSockDiag:
    """A reader that does not work."""

    def __init__(self, _netns: Path) -> None:
        raise SocketTableError("modprobe tcp_diag may help")


def test_procfs_is_read_where_sock_diag_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`auto` falls back and says why; a named table does not."""
    tables = open_tables("auto", "self")
    assert (tables.name, caplog.text) == ("sock_diag", "")
    tables.close()
    monkeypatch.setattr(sockets, "SockDiagReader", NoSockDiag)
    tables = open_tables("auto", "self")
    assert tables.name == "procfs"
    tables.close()
    assert "modprobe tcp_diag may help" in caplog.text
    with pytest.raises(SocketTableError, match="modprobe"):
        open_tables("sock_diag", "self")


def test_a_namespace_that_is_not_there_is_told_of() -> None:
    """The error names it."""
    with pytest.raises(
        SettingsError, match=r"no network namespace /run/netns/none-such \("
    ):
        open_tables("procfs", "none-such")


def test_a_namespace_without_sockets_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody uses or names is closed after a while; the first never is."""
    first, empty, used, named = (
        MadeReader(1),
        MadeReader(2),
        MadeReader(3, (80, SS_LISTEN)),
        MadeReader(4),
    )
    monkeypatch.setattr(namespaces, "named", lambda: {4: "blue"})
    tables = SocketTables([first, empty, used, named])
    tables.established()
    assert tables.namespaces().tolist() == [1, 2, 3, 4]
    monkeypatch.setattr(sockets, "FORGET_S", 0)
    tables.established()
    assert tables.namespaces().tolist() == [1, 3, 4]
    assert [each.closed for each in (first, empty, used, named)] == [
        False,
        True,
        False,
        False,
    ]


AGE = struct.pack("=5xB38xIIIII104xQ", 0, 5_003, 0, 7_001, 11_003, 0, 13_000_000)


def age_ns(*attributes: bytes) -> int:
    (rows,), _ = decode(diag_message(443, *attributes, state=SS_ESTABLISHED))
    (found,) = sockets._diag_entries(rows, 0)["age_ns"].tolist()
    return int(found)


def test_the_longest_time_since_anything_is_the_age() -> None:
    """Data sent, received or acknowledged, or data under way, whatever is the longest."""
    busy_ns = 13_000_000_000
    assert age_ns(attribute(INET_DIAG_INFO, AGE)) == busy_ns - JIFFY_NS
    idle = attribute(INET_DIAG_INFO, AGE[:168] + bytes(8))
    assert age_ns(idle) == 11_003_000_000 - JIFFY_NS


def test_data_in_the_syn_makes_no_age() -> None:
    """With TCP Fast Open data came before the connection was established."""
    with_syn_data = AGE[:5] + bytes([TCPI_OPT_SYN_DATA]) + AGE[6:52]
    info = with_syn_data + struct.pack("=II", 2**31, 3_001) + AGE[60:]
    assert age_ns(attribute(INET_DIAG_INFO, info)) == 5_003_000_000 - JIFFY_NS


def test_an_age_that_is_not_told_is_0() -> None:
    """Without the attribute, or with one of an old kernel that is too short."""
    assert age_ns() == 0
    assert age_ns(attribute(INET_DIAG_INFO, AGE[:100])) == 0
