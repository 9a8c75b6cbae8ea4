# SPDX-License-Identifier: GPL-3.0-only
"""Decoding captured, constructed and damaged messages of sock_diag."""

import socket
import struct
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, SS_ESTABLISHED, SS_LISTEN

from tcpexporter.errors import SocketTableError
from tcpexporter.socket_tables import diag_messages
from tcpexporter.socket_tables.diag_messages import (
    DIAG_MESSAGE,
    INET_DIAG_INFO,
    INET_DIAG_SKV6ONLY,
    JIFFY_NS,
    TCPI_OPT_SYN_DATA,
    decode_messages,
    split_messages,
)
from tcpexporter.socket_tables.entries import Bytes
from tcpexporter.socket_tables.sock_diag import dump_request
from tests.unit.data.capture import FAMILY_WITHOUT_DIAG, SEQUENCE
from tests.unit.socket_tables.samples import (
    DONE,
    NETNS,
    attribute,
    captured,
    decode,
    diag_message,
    message,
)


def ports(runs: list[Bytes]) -> list[list[int]]:
    return [decode_messages(rows, 0)["key"]["local_port"].tolist() for rows in runs]


def test_the_request_is_as_the_kernel_expects_it() -> None:
    """The request has 72 bytes. The kernel repeats it in an error, which was captured."""
    echoed = captured("diag-error.bin")[20:].tobytes()
    assert dump_request(FAMILY_WITHOUT_DIAG, 0xFFF, 0, SEQUENCE) == echoed
    assert len(echoed) == 72
    states = 1 << SS_ESTABLISHED | 1 << SS_LISTEN
    assert dump_request(socket.AF_INET6, states, 2, 258) == struct.pack(
        "=IHHIIBBBBI48x", 72, 20, 0x301, 258, 0, 10, 6, 2, 0, 0x402
    )


def test_done_ends_a_dump() -> None:
    """The message is alone in its datagram, as captured, or follows other messages."""
    assert decode(captured("diag-inet-1.bin").tobytes()) == ([], True)
    runs, finished = decode(diag_message(443) + DONE)
    assert (ports(runs), finished) == ([[443]], True)


def test_a_failed_dump_is_an_error() -> None:
    """Without tcp_diag the kernel ends a dump with DONE and ENOENT."""
    with pytest.raises(SocketTableError, match="No such file or directory"):
        decode(message(NLMSG_DONE, struct.pack("=i", -2)))


def test_other_messages_are_errors() -> None:
    """Another type, another request, a wrong alignment, or an invalid error number."""
    for reply in (
        diag_message(443, sequence=SEQUENCE - 1),
        message(1, bytes(100)),
        struct.pack("=IHHII", 89, SOCK_DIAG_BY_FAMILY, 2, SEQUENCE, 0) + bytes(73),
        message(NLMSG_ERROR, struct.pack("=i", -(2**31))),
    ):
        with pytest.raises(SocketTableError):
            decode(reply)


def test_a_dump_continues_until_done() -> None:
    """A datagram without DONE is not the last one."""
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
def test_an_error_of_the_kernel_is_named(reply: bytes, reason: str) -> None:
    """The message has the text for the error number."""
    with pytest.raises(SocketTableError, match=f"sock_diag refuses: .*{reason}"):
        decode(reply)


def test_messages_of_different_lengths_are_split_into_runs() -> None:
    """Each run has messages of one length, in the order of the datagram."""
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
    """The next message begins at a multiple of four: netlink(7), NLMSG_ALIGN."""
    odd = diag_message(443, attribute(INET_DIAG_SKV6ONLY, b"\1"))
    reply = struct.pack("=I", len(odd) - 3) + odd[4:]
    runs, finished = decode(reply + reply + DONE)
    assert (ports(runs), finished) == ([[443, 443]], True)


@pytest.mark.parametrize("name", ["diag-inet-0.bin", "diag-inet6-0.bin"])
def test_a_truncated_reply_is_refused(name: str) -> None:
    """The error has the first byte of the incomplete message."""
    whole = captured(name)
    starts = list(starts_of(whole.tobytes()))
    assert len(starts) > 11
    for size in range(1, len(whole)):
        if size in starts:
            assert not split_messages(whole[:size], SEQUENCE)[1]
            continue
        start = max(each for each in starts if each < size)
        with pytest.raises(SocketTableError, match=rf"malformed message at byte {start}$"):
            split_messages(whole[:size], SEQUENCE)


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
    """It is too small for the fields, or exceeds the reply. The error has the byte."""
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
    """Decode a reply as the reader does; SocketTableError is allowed."""
    try:
        runs, _ = split_messages(reply, SEQUENCE)
    except SocketTableError:
        return
    for rows in runs:
        decode_messages(rows, NETNS)


@given(reply=st.one_of(st.binary(), st.lists(any_message, max_size=7).map(b"".join)))
def test_any_reply_is_decoded_or_refused(reply: bytes) -> None:
    """Decoding ends for any bytes; the only exception is SocketTableError."""
    decode_or_refuse(np.frombuffer(reply, np.uint8))


@given(
    name=st.sampled_from(["diag-inet-0.bin", "diag-inet6-0.bin", "diag-error.bin"]),
    changes=st.dictionaries(st.integers(0, 2000), st.integers(0, 255), max_size=7),
)
def test_a_damaged_reply_is_decoded_or_refused(name: str, changes: dict[int, int]) -> None:
    """The captured replies, with some bytes changed, are decoded or refused, too."""
    reply = captured(name)
    for place, byte in changes.items():
        reply[place % len(reply)] = byte
    decode_or_refuse(reply)


def v6only(*attributes: bytes) -> list[bool]:
    (rows,), _ = decode(diag_message(443, *attributes))
    found: list[bool] = decode_messages(rows, 0)["v6only"].tolist()
    return found


def test_an_attribute_is_found_at_any_position() -> None:
    """It is the first or last attribute, between others, missing, or empty."""
    yes, other = attribute(INET_DIAG_SKV6ONLY, b"\1"), attribute(8, b"\1\1\1\1\1")
    assert v6only(yes) == v6only(yes, other) == v6only(other, yes) == [True]
    assert v6only(other, other, yes, other) == [True]
    assert v6only() == v6only(other) == v6only(other, other) == [False]
    assert v6only(other, attribute(INET_DIAG_SKV6ONLY, b"\0")) == [False]
    assert v6only(other, attribute(INET_DIAG_SKV6ONLY, b"")) == [False]


def test_messages_of_one_run_can_have_different_attributes() -> None:
    """They have equal lengths, but their attributes have another order."""
    yes, no, other = (
        attribute(INET_DIAG_SKV6ONLY, b"\1"),
        attribute(INET_DIAG_SKV6ONLY, b"\0"),
        attribute(8, bytes(4)),
    )
    messages = [(yes, other), (other, yes), (no, other), (other, no), (other, other)]
    (rows,), _ = decode(b"".join(diag_message(443, *each) for each in messages))
    entries = decode_messages(rows, 0)
    assert entries["v6only"].tolist() == [True, True, False, False, False]


@given(data=st.lists(st.binary(min_size=24, max_size=24), min_size=1, max_size=7))
def test_any_attributes_are_searched_to_their_end(data: list[bytes]) -> None:
    """Lengths may be 0 or exceed the message; the first byte of the payload is correct."""
    rows = np.frombuffer(b"".join(diag_message(443, each) for each in data), np.uint8)
    has, payload = diag_messages._attribute(
        rows.reshape(len(data), -1), INET_DIAG_SKV6ONLY, 1
    )
    found = np.zeros(len(data), np.uint8)
    found[has] = payload[:, 0]
    assert found.tolist() == [first_byte(each, INET_DIAG_SKV6ONLY) for each in data]


def first_byte(attributes: bytes, kind: int) -> int:
    """Return the first byte of the payload in one message; 0 if there is none."""
    found = 0
    while len(attributes) >= 5:
        length, here = struct.unpack_from("=HH", attributes)
        if here == kind and length >= 5:
            found = attributes[4]
        attributes = attributes[max((length + 3) // 4 * 4, 4) :]
    return found


AGE = struct.pack("=5xB38xIIIII104xQ", 0, 5_003, 0, 7_001, 11_003, 0, 13_000_000)


def age_ns(*attributes: bytes) -> int:
    (rows,), _ = decode(diag_message(443, *attributes, state=SS_ESTABLISHED))
    (found,) = decode_messages(rows, 0)["age_ns"].tolist()
    return int(found)


def test_the_longest_time_is_the_age() -> None:
    """It is the longest of several times: since data was sent, received or acknowledged."""
    busy_ns = 13_000_000_000
    assert age_ns(attribute(INET_DIAG_INFO, AGE)) == busy_ns - JIFFY_NS
    idle = attribute(INET_DIAG_INFO, AGE[:168] + bytes(8))
    assert age_ns(idle) == 11_003_000_000 - JIFFY_NS


def test_data_in_the_syn_does_not_count_for_the_age() -> None:
    """With TCP Fast Open data arrives before the connection is established."""
    with_syn_data = AGE[:5] + bytes([TCPI_OPT_SYN_DATA]) + AGE[6:52]
    info = with_syn_data + struct.pack("=II", 2**31, 3_001) + AGE[60:]
    assert age_ns(attribute(INET_DIAG_INFO, info)) == 5_003_000_000 - JIFFY_NS


def test_a_missing_age_is_0() -> None:
    """The attribute is missing, or too short as in old kernels."""
    assert age_ns() == 0
    assert age_ns(attribute(INET_DIAG_INFO, AGE[:100])) == 0
