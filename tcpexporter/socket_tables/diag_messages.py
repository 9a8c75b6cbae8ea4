# SPDX-License-Identifier: GPL-3.0-only
"""Decodes the messages of a sock_diag dump, many at once: sock_diag(7)."""

import os
import socket
import struct

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import IPV4_PREFIX, Records
from tcpexporter.errors import SocketTableError
from tcpexporter.lean import part_of
from tcpexporter.socket_tables.entries import ENTRY, TCP_LISTEN, Bytes

with part_of("pyroute2"):  # importing all of it would use 8 MiB more
    from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
    from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY

FEW = 64
"""Number of messages that are compared first, before all messages of a reply."""

DIAG_MESSAGE = np.dtype(
    [
        ("length", "u4"),
        ("type", "u2"),
        ("flags", "u2"),
        ("sequence", "u4"),
        ("sender", "u4"),
        ("family", "u1"),
        ("state", "u1"),
        ("timer", "u1"),
        ("retrans", "u1"),
        ("local_port", ">u2"),
        ("remote_port", ">u2"),
        ("local_address", "u1", 16),
        ("remote_address", "u1", 16),
        ("device", "u4"),
        ("cookie", "u8"),
        ("rest", "V20"),
    ]
)
"""``struct nlmsghdr`` and ``struct inet_diag_msg``: netlink(7), sock_diag(7)."""

NETLINK_HEADER = struct.Struct("=IHHI")
"""The first fields of a header, netlink(7): length, type, flags, sequence number."""

NETLINK_HEADER_BYTES = 16

NETLINK_SEQUENCE = slice(8, 12)
"""The bytes of a header that have the sequence number."""

INET_DIAG_INFO = 2
INET_DIAG_SKV6ONLY = 11
INET_DIAG_CGROUP_ID = 21
"""Numbers of attributes in a reply: include/uapi/linux/inet_diag.h."""

TCP_INFO = np.dtype(
    {
        "names": [
            "options",
            "last_data_sent_ms",
            "last_data_recv_ms",
            "last_ack_recv_ms",
            "busy_time_us",
        ],
        "formats": ["u1", "u4", "u4", "u4", "u8"],
        "offsets": [5, 44, 52, 56, 168],
        "itemsize": 176,
    }
)
"""The fields of ``struct tcp_info`` that ages come from: include/uapi/linux/tcp.h."""

TCPI_OPT_SYN_DATA = 32

JIFFY_NS = 10_000_000
"""The longest jiffy, at HZ=100, in ns. A duration in jiffies can be one too large."""


def split_messages(reply: Bytes, sequence: int) -> tuple[list[Bytes], bool]:
    """Split datagrams of a dump into messages.

    Returns:
        One array of bytes, of shape (messages, length), for each run of messages of the
        same length; nearly all messages of a dump have the same length. And whether the
        dump ends with these datagrams.

    Raises:
        SocketTableError: the kernel reports an error; or a message is malformed or has a
            sequence number other than ``sequence``. The error names the byte.
    """
    runs: list[Bytes] = []
    offset = 0
    while offset < len(reply):
        length, kind = _message(reply, offset, sequence)
        # A failed dump ends with NLMSG_DONE, too; then the error number is negative.
        error = int(reply[offset + 16 : offset + 20].view(np.int32)[0])
        if kind == NLMSG_ERROR or (kind == NLMSG_DONE and error < 0):
            raise SocketTableError(f"sock_diag refuses: {os.strerror(min(-error, 4095))}")
        aligned = (length + 3) & ~3
        left = len(reply) - offset
        if kind == NLMSG_DONE and aligned == left:
            return runs, True
        if kind == SOCK_DIAG_BY_FAMILY and length < DIAG_MESSAGE.itemsize:
            raise SocketTableError(f"sock_diag reply: short message at byte {offset}")
        if kind != SOCK_DIAG_BY_FAMILY or aligned > left:
            raise _malformed(offset)
        rows = reply[offset : offset + left // aligned * aligned].reshape(-1, aligned)
        # Compare a few first: otherwise the time would be quadratic if all messages differ.
        few = _alike(rows[:FEW])
        rows = _alike(rows) if len(few) == FEW else few
        runs.append(rows)
        offset += rows.size
    return runs, False


def without_sequence(rows: Bytes) -> bytes:
    """Return the content of messages, apart from the sequence number of the dump.

    Args:
        rows: one run of `split_messages`: they have the same length, type and flags.
    """
    rest: bytes = rows[:, NETLINK_SEQUENCE.stop :].tobytes()
    return rows[:1, : NETLINK_SEQUENCE.start].tobytes() + rest


def _alike(rows: Bytes) -> Bytes:
    """Return the leading messages of the same length, type, flags and sequence number."""
    alike = (rows[:, :12] == rows[0, :12]).all(axis=1)
    return rows[: len(rows) if alike.all() else int(alike.argmin())]


def _message(reply: Bytes, offset: int, sequence: int) -> tuple[int, int]:
    """Return the length and type of the message at ``offset``."""
    left = len(reply) - offset
    if left < NETLINK_HEADER_BYTES + 4:
        raise _malformed(offset)
    length, kind, _, answered = NETLINK_HEADER.unpack_from(reply.data, offset)
    if answered != sequence or not NETLINK_HEADER_BYTES + 4 <= length <= left:
        raise _malformed(offset)
    return length, kind


def _malformed(offset: int) -> SocketTableError:
    return SocketTableError(f"sock_diag reply: malformed message at byte {offset}")


def decode_messages(
    rows: Bytes, netns: int, *, with_ages: bool = True, with_cgroups: bool = False
) -> Records:
    """Decode messages of equal length to dtype `ENTRY`.

    Args:
        rows: the messages, an array of bytes of shape (messages, length).
        netns: the inode of the namespace, for the keys of the entries.
        with_ages: whether to read ages from ``struct tcp_info``.
        with_cgroups: whether to read cgroups. Since Linux 5.9 the kernel always sends them:
            inet_diag_msg_attrs_fill in its net/ipv4/inet_diag.c.
    """
    messages = np.ascontiguousarray(rows[:, : DIAG_MESSAGE.itemsize]).view(DIAG_MESSAGE)[
        :, 0
    ]
    entries = np.zeros(len(messages), ENTRY)
    is_ipv4 = messages["family"] == socket.AF_INET
    for end in ("local", "remote"):
        # Copying words, one column at a time, takes a third of the time of copying bytes.
        address = entries["key"][f"{end}_address"].view(np.uint32)
        given = messages[f"{end}_address"].view(np.uint32)
        for word, prefix in enumerate(IPV4_PREFIX.view(np.uint32)):
            address[:, word] = np.where(is_ipv4, prefix, given[:, word])
        address[:, 3] = np.where(is_ipv4, given[:, 0], given[:, 3])
        entries["key"][f"{end}_port"] = messages[f"{end}_port"]
    entries["key"]["netns"] = netns
    entries["state"] = messages["state"]
    entries["cookie"] = messages["cookie"]
    is_listener = messages["state"] == TCP_LISTEN
    if is_listener.any():
        has, v6only = _attribute(rows, INET_DIAG_SKV6ONLY, 1)
        entries["v6only"][has] = v6only[:, 0] != 0
    if with_ages and not is_listener.all():
        has, info = _attribute(rows, INET_DIAG_INFO, TCP_INFO.itemsize)
        entries["age_ns"][has] = _lowest_ages_ns(info.view(TCP_INFO)[:, 0])
    if with_cgroups:
        has, cgroups = _attribute(rows, INET_DIAG_CGROUP_ID, 8)
        entries["cgroup"][has] = np.ascontiguousarray(cgroups).view(np.uint64)[:, 0]
    return entries


def _attribute(rows: Bytes, kind: int, size: int) -> tuple[npt.NDArray[np.intp], Bytes]:
    """Read the first ``size`` bytes of an attribute's payload.

    Returns:
        The indices of the messages that have an attribute of this kind and of at least this
        size; and the bytes, of shape (indices, size).
    """
    # Attributes are aligned to 4 bytes, and comparing words is four times as fast.
    words = np.ascontiguousarray(rows).view(np.uint32)
    needed = -(-size // 4)
    payload_at = _payloads_at(words, kind, size)
    has = np.flatnonzero(payload_at)
    at = payload_at[has]
    if len(has) == len(words) and (at == at[0]).all():
        payload = np.ascontiguousarray(words[:, at[0] : at[0] + needed])
    else:
        payload = words[has[:, None], at[:, None] + np.arange(needed)]
    return has, payload.view(np.uint8)[:, :size]


def _payloads_at(
    words: npt.NDArray[np.uint32], kind: int, size: int
) -> npt.NDArray[np.intp]:
    """Return the index of the word where an attribute's payload begins, in each message.

    The index is 0 if a message has no attribute of this kind and of at least this size.
    """
    payload_at = np.zeros(len(words), np.intp)
    position = DIAG_MESSAGE.itemsize // 4
    while position + -(-size // 4) < words.shape[1]:
        headers = words[:, position]
        if (headers != headers[0]).any():
            return _payloads_at_one_by_one(words, kind, size)
        length, found = (int(each) for each in headers[:1].view(np.uint16))
        if found == kind and length >= 4 + size:
            payload_at[:] = position + 1
        position += max((length + 3) // 4, 1)
    return payload_at


def _payloads_at_one_by_one(
    words: npt.NDArray[np.uint32], kind: int, size: int
) -> npt.NDArray[np.intp]:
    """Return the same as `_payloads_at` for messages with different attributes.

    Each pass of the loop advances by one attribute in every message.
    """
    payload_at = np.zeros(len(words), np.intp)
    position = np.full(len(words), DIAG_MESSAGE.itemsize // 4)
    every = np.arange(len(words))
    while len(every := every[position[every] < words.shape[1]]):
        at = position[every]
        header = words[every, at][:, None].view(np.uint16)
        length = header[:, 0].astype(np.intp)
        is_wanted = (header[:, 1] == kind) & (length >= 4 + size)
        is_wanted &= at + 1 + -(-size // 4) <= words.shape[1]
        payload_at[every[is_wanted]] = at[is_wanted] + 1
        position[every] += np.maximum((length + 3) // 4, 1)
    return payload_at


def _lowest_ages_ns(info: Records) -> npt.NDArray[np.int64]:
    """Return lower bounds of the ages of connections, in ns, from dtype `TCP_INFO`.

    Each of these times begins when the connection is established, or later:

    - last_data_sent: tcp_finish_connect and tcp_rcv_state_process set ``lsndtime``
      when they establish the connection.
    - last_data_recv: tcp_finish_connect and tcp_create_openreq_child set ``lrcvtime``.
      If the SYN carried data (TCP Fast Open), the latter runs at the SYN, which is too
      early.
    - last_ack_recv: tcp_ack sets ``rcv_tstamp``, for the handshake at the latest.
    - busy_time: the time during which data was in flight. With Fast Open it can begin too
      early, too.

    Source: the kernel's net/ipv4, v4.10 to v6.18. The times are in jiffies, which stop
    during suspend and wrap around. Both make the ages smaller.
    """
    by_sender = np.maximum(info["last_data_sent_ms"], info["last_ack_recv_ms"])
    by_all = np.maximum(by_sender, info["last_data_recv_ms"])
    has_syn_data = info["options"] & TCPI_OPT_SYN_DATA != 0
    age_ns = np.where(has_syn_data, by_sender, by_all).astype(np.int64) * 1_000_000
    busy_ns = np.where(has_syn_data, 0, info["busy_time_us"]).astype(np.int64) * 1_000
    ages_ns: npt.NDArray[np.int64] = np.maximum(age_ns, busy_ns) - JIFFY_NS
    return np.maximum(ages_ns, 0)
