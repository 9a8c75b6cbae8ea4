# SPDX-License-Identifier: GPL-3.0-only
"""Connections and listeners from entries of captured and constructed tables."""

import socket
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY

from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import LISTENER
from tcpexporter.socket_tables import entries
from tcpexporter.socket_tables.diag_messages import decode_messages
from tcpexporter.socket_tables.entries import TCP_LISTEN, distinct_listeners
from tcpexporter.socket_tables.procfs import decode_lines
from tcpexporter.socket_tables.tables import SocketTables
from tests.unit.socket_tables.samples import (
    KNOWN_KEYS,
    NETNS,
    SOURCES,
    CapturedReader,
    MadeReader,
    captured_sockets,
    decode,
    message,
    sockets_of,
)


@pytest.mark.parametrize("name", SOURCES)
def test_every_captured_socket_is_decoded_once(name: str) -> None:
    """Both kinds of table have the addresses, ports and states of all sockets."""
    found = sockets_of(CapturedReader(name).everything())
    assert len(found) == len(set(found))
    assert set(found) == captured_sockets()


@pytest.mark.parametrize("name", SOURCES)
def test_keys_are_those_of_the_bpf_program(name: str) -> None:
    """Addresses are in network order, the other fields in host order."""
    keys = SocketTables([CapturedReader(name)]).established()["key"]
    assert len(keys) == 22
    assert {key.tobytes() for key in keys} >= KNOWN_KEYS


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", SOURCES)
def test_batches_have_the_connections_of_the_whole_table(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection is in one batch, in the same order, with the same direction."""
    monkeypatch.setattr(entries, "BATCH", size)
    whole = SocketTables([CapturedReader(name)]).established()
    batches = [*SocketTables([CapturedReader(name)]).batches()]
    joined = np.concatenate(batches)
    for field in ("key", "is_outbound", "cookie", "cgroup"):
        assert (joined[field] == whole[field]).all()
    if name == "sock_diag":  # procfs is read at once
        assert (len(batches) == 1) == (size == 1000)


def test_tables_without_connections_have_no_batch() -> None:
    """The listeners are not among the connections."""
    tables = SocketTables([MadeReader(NETNS, (443, TCP_LISTEN))])
    assert [*tables.batches()] == []


def test_both_tables_give_the_same_keys() -> None:
    """All bytes of the key of a connection are equal."""
    by_diag, by_procfs = (
        {key.tobytes() for key in SocketTables([CapturedReader(name)]).established()["key"]}
        for name in SOURCES
    )
    assert by_diag == by_procfs


@pytest.mark.parametrize("name", SOURCES)
def test_connections_have_a_direction_and_a_time(name: str) -> None:
    """A connection with a listener at its local port is inbound; the time is now."""
    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    found = SocketTables([CapturedReader(name)]).established()
    after_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    is_inbound = found["is_outbound"] == Direction.INBOUND
    assert (
        sorted(found["key"]["local_port"][is_inbound])
        == [8001] * 4 + [8003] * 2 + [8005] * 5
    )
    is_outbound = found["is_outbound"] == Direction.OUTBOUND
    assert sorted(found["key"]["local_port"][is_outbound]) == list(range(40001, 40012))
    assert (found["established_ns"] >= before_ns).all()
    assert (found["established_ns"] <= after_ns).all()
    assert len(np.unique(found["cookie"])) == (1 if name == "procfs" else len(found))
    assert not found["pad"].any()


@pytest.mark.parametrize(
    ("name", "extra"),
    [("sock_diag", set()), ("procfs", {(8004, 4)})],  # procfs does not show v6only
)
def test_there_is_a_listener_for_each_accepted_ip_version(
    name: str, extra: set[tuple[int, int]]
) -> None:
    """The address :: accepts both versions unless it is v6only. Any other address
    accepts its own version."""
    listeners = SocketTables([CapturedReader(name)]).listeners()
    assert (listeners["netns"] == NETNS).all()
    assert [
        (int(port), int(version)) for _, port, version, _ in listeners.tolist()
    ] == sorted({(8001, 4), (8002, 4), (8003, 6), (8004, 6), (8005, 4), (8005, 6)} | extra)


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 2), st.sampled_from([4, 6]), st.integers(0, 2)
        )
    )
)
def test_equal_listeners_are_one(rows: list[tuple[int, int, int, int]]) -> None:
    """A server with a socket for each CPU has one listener; they are in ascending order."""
    found = distinct_listeners(np.array(rows, LISTENER))
    assert found.tolist() == sorted({*rows})


any_entry = st.tuples(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65535),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65535),
    st.integers(1, 12),
)


@given(entries=st.lists(any_entry, max_size=7), is_ipv4=st.booleans())
def test_both_decoders_return_what_was_encoded(
    entries: list[tuple[bytes, int, bytes, int, int]], *, is_ipv4: bool
) -> None:
    """This holds for any addresses, ports and states."""
    size, words = (4, 1) if is_ipv4 else (16, 4)
    prefix = b"\0" * 10 + b"\xff" * 2 if is_ipv4 else b""
    expected = [
        prefix
        + local[:size]
        + prefix
        + remote[:size]
        + struct.pack("=IHHBBqQQ", NETNS, *rest)
        for local, port, remote, other, state in entries
        for rest in [(port, other, state, 0, 0, 0, 0)]
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
    by_diag = [entry for rows in runs for entry in decode_messages(rows, NETNS)]
    assert [entry.tobytes() for entry in by_diag] == expected
    text = "".join(
        f"{number:4d}: {hexadecimal(local[:size])}:{port:04X}"
        f" {hexadecimal(remote[:size])}:{other:04X} {state:02X} \n"
        for number, (local, port, remote, other, state) in enumerate(entries)
    )
    by_procfs = decode_lines(text.encode(), words, NETNS)
    assert [entry.tobytes() for entry in by_procfs] == expected


def hexadecimal(address: bytes) -> str:
    """Format an address as the kernel does: each word as a number in host byte order."""
    words = struct.unpack(f"={len(address) // 4}I", address)
    return "".join(f"{word:08X}" for word in words)
