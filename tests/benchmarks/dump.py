# SPDX-License-Identifier: GPL-3.0-only
"""Receives the kernel's dump of established TCP sockets as fast as possible.

See sock_diag(7); the structs are in include/uapi/linux/inet_diag.h.
"""

import socket
import struct
from collections.abc import Iterator

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_DONE = 3
TCP_ESTABLISHED = 1
INET_DIAG_INFO = 2

HEADER = struct.Struct("=IHHII")
REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2; zeros mean any address
DONE = struct.Struct("=IHHIIi")
NUMBERS = struct.Struct("!HH16s16s")
"""Ports and addresses in struct inet_diag_msg; four other bytes precede them."""

BUFFER_BYTES = 1 << 20
DEADLINE_S = 60.0


def received(*, tcp_info: bool) -> Iterator[memoryview]:
    """Yield each datagram of an IPv4 and an IPv6 dump; it is valid until the next one."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as asked:
            asked.settimeout(DEADLINE_S)
            asked.send(_request(family, tcp_info=tcp_info))
            while True:
                datagram = buffer[: asked.recv_into(buffer)]
                yield datagram
                if _is_last(datagram):
                    break


def address_pairs() -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield local port, remote port and both addresses (16 bytes each) of each socket."""
    for datagram in received(tcp_info=False):
        offset = 0
        while offset < len(datagram):
            length, kind, *_ = HEADER.unpack_from(datagram, offset)
            if kind == SOCK_DIAG_BY_FAMILY:
                yield NUMBERS.unpack_from(datagram, offset + HEADER.size + 4)
            offset += (length + 3) & ~3


def _request(family: int, *, tcp_info: bool) -> bytes:
    extensions = 1 << (INET_DIAG_INFO - 1) if tcp_info else 0
    request = REQUEST.pack(family, socket.IPPROTO_TCP, extensions, 1 << TCP_ESTABLISHED)
    length = HEADER.size + len(request)
    return HEADER.pack(length, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 0, 0) + request


def _is_last(datagram: memoryview) -> bool:
    """Return whether the datagram ends with NLMSG_DONE."""
    if len(datagram) < DONE.size:
        return False
    length, kind, *_ = DONE.unpack_from(datagram, len(datagram) - DONE.size)
    return bool(length == DONE.size and kind == NLMSG_DONE)
