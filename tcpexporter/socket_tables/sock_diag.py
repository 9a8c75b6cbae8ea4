# SPDX-License-Identifier: GPL-3.0-only
"""Dumps the kernel's TCP sockets over netlink: sock_diag(7)."""

import contextlib
import functools
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tcpexporter.connections.record import Records
from tcpexporter.errors import SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.lean import part_of
from tcpexporter.socket_tables.diag_messages import (
    INET_DIAG_INFO,
    NETLINK_HEADER,
    NETLINK_HEADER_BYTES,
    decode_messages,
    split_messages,
    without_sequence,
)
from tcpexporter.socket_tables.entries import TCP_ESTABLISHED, TCP_LISTEN, Bytes
from tcpexporter.socket_tables.netns_thread import run_in_netns

with part_of("pyroute2"):  # importing all of it would use 8 MiB more
    from pyroute2.netlink import (
        NETLINK_SOCK_DIAG,
        NLM_F_DUMP,
        NLM_F_REQUEST,
        NLMSG_DONE,
        NLMSG_ERROR,
    )
    from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, inet_diag_req

DATAGRAM_BYTES = 65536
"""Size of a buffer, in bytes. A datagram of a dump has at most 32 KiB (netlink_dump in the
kernel's net/netlink/af_netlink.c)."""

REPLY_BYTES = 8 * DATAGRAM_BYTES
"""Number of bytes of a dump that are decoded at once."""

REPLY_TIMEOUT_S = 10

DONE_BYTES = NETLINK_HEADER_BYTES + 4
"""Size of NLMSG_DONE: the header, and an error number; 0 means a complete dump."""


class SockDiagReader:
    """Reads the sockets of one network namespace with sock_diag(7)."""

    name = "sock_diag"

    def __init__(self, netns: Path, *, with_cgroups: bool = False) -> None:
        """Open the sockets, and read the listeners once to check that the kernel answers.

        Args:
            netns: the path of the namespace.
            with_cgroups: whether to decode the cgroups of sockets.

        Raises:
            SocketTableError: the namespace cannot be entered, or the kernel does not
                answer.
        """
        self._with_cgroups = with_cgroups
        self._listening: Sequence[Records] = ()
        self._listening_from: Sequence[bytes] = ()
        """The messages from which `listening` has decoded them."""
        with contextlib.ExitStack() as opened, namespaces.opened(netns) as descriptor:
            self.netns = os.fstat(descriptor).st_ino
            try:
                self._for_entries = DumpSocket(run_in_netns(descriptor, _netlink_socket))
                opened.callback(self._for_entries.close)
                self._for_listening = DumpSocket(run_in_netns(descriptor, _netlink_socket))
                opened.callback(self._for_listening.close)
            except OSError as error:
                raise SocketTableError(
                    f"cannot open sock_diag in {netns}: {error.strerror}: start as root,"
                    " or use --netns self"
                ) from error
            self.listening()
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def entries(self, *, with_ages: bool) -> Iterator[Records]:
        states = 1 << TCP_ESTABLISHED | 1 << TCP_LISTEN
        extensions = 1 << (INET_DIAG_INFO - 1) if with_ages else 0
        for messages in self._for_entries.dump(states, extensions):
            yield self._decode(messages, with_ages=with_ages)

    def listening(self) -> Sequence[Records]:
        runs = [*self._for_listening.dump(1 << TCP_LISTEN, 0)]
        # Listeners rarely change, and decoding takes four times as long as the dump.
        contents = [without_sequence(each) for each in runs]
        if contents != self._listening_from:
            self._listening = [self._decode(each, with_ages=False) for each in runs]
            self._listening_from = contents
        return self._listening

    def _decode(self, messages: Bytes, *, with_ages: bool) -> Records:
        return decode_messages(
            messages, self.netns, with_ages=with_ages, with_cgroups=self._with_cgroups
        )


def _netlink_socket() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    # A connected socket accepts messages from the kernel only. Otherwise a process that is
    # root in the namespace, such as a container's root, could send messages to it
    # (netlink_getsockbyportid in the kernel's net/netlink/af_netlink.c).
    opened.connect((0, 0))
    opened.settimeout(REPLY_TIMEOUT_S)
    return opened


class DumpSocket:
    """A netlink socket that does one dump at a time.

    While a dump is in progress, the kernel refuses a second dump on the same socket
    (EBUSY).
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._sequence = 0
        self._is_in_progress = False
        self.close = opened.close

    def dump(self, states: int, extensions: int) -> Iterator[Bytes]:
        """Dump the IPv4 and IPv6 sockets that are in one of ``states``.

        Args:
            states: the set of states, as in `dump_request`.
            extensions: the set of attributes, as in `dump_request`.

        Yields:
            Messages of equal length, as `split_messages` returns them.

        Raises:
            SocketTableError: the kernel does not answer, or its reply is malformed.
        """
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                self._discard_rest()
                self._sequence += 1
                request = dump_request(family, states, extensions, self._sequence)
                self._socket.send(request)
                self._is_in_progress = True
                yield from self._replies()
        except OSError as error:
            raise SocketTableError(
                f"sock_diag does not answer ({error}): modprobe tcp_diag may help"
            ) from error

    def _discard_rest(self) -> None:
        """Read and drop the rest of a dump that failed or was abandoned."""
        try:
            while self._is_in_progress:
                self._receive()
        finally:
            self._is_in_progress = False  # if the end was lost, do not wait for it again

    def _replies(self) -> Iterator[Bytes]:
        """Yield the datagrams of a dump, many at once: each has 100 to 200 sockets.

        Receiving in a second thread is not faster: that was measured.
        """
        while self._is_in_progress:
            reply = self._receive()
            yield from self._runs(reply, is_last=not self._is_in_progress)

    def _receive(self) -> Bytes:
        """Receive datagrams until the buffer is full or the dump ends, and return them."""
        buffer = np.empty(REPLY_BYTES, np.uint8)
        filled = 0
        while self._is_in_progress and len(buffer) - filled >= DATAGRAM_BYTES:
            room = buffer[filled:]
            datagram = room[: self._socket.recv_into(room.data)]
            if _answers(datagram, self._sequence):  # skips the rest of an abandoned dump
                filled += len(datagram)
                self._is_in_progress = not _ends(datagram)
        return buffer[:filled]

    def _runs(self, reply: Bytes, *, is_last: bool) -> list[Bytes]:
        runs, has_ended = split_messages(reply, self._sequence)
        if has_ended != is_last:
            self._is_in_progress = not has_ended
            raise SocketTableError(
                f"sock_diag reply: {'no' if is_last else 'an'} end at byte {len(reply)}"
            )
        return runs


def _answers(datagram: Bytes, sequence: int) -> bool:
    """Return whether a datagram answers the request with this sequence number.

    A datagram that is too short for a sequence number counts as an answer: `split_messages`
    refuses it with an error.
    """
    if len(datagram) < NETLINK_HEADER_BYTES:
        return True
    _, _, _, answered = NETLINK_HEADER.unpack_from(datagram.data)
    return bool(answered == sequence)


def _ends(datagram: Bytes) -> bool:
    """Return whether a datagram is the last of a dump.

    The last message of a dump is NLMSG_DONE. It has its own datagram, or follows the last
    sockets if it fits.
    """
    if len(datagram) < DONE_BYTES:
        return False
    _, first, _, sequence = NETLINK_HEADER.unpack_from(datagram.data)
    last = NETLINK_HEADER.unpack_from(datagram[-DONE_BYTES:].data)
    length, kind, _, answered = last
    is_done = (length, kind, answered) == (DONE_BYTES, NLMSG_DONE, sequence)
    return is_done or first in (NLMSG_DONE, NLMSG_ERROR)


def dump_request(family: int, states: int, extensions: int, sequence: int) -> bytes:
    """Return a request for the TCP sockets of one address family.

    Args:
        family: AF_INET or AF_INET6.
        states: a bit ``1 << state`` for each requested TCP state.
        extensions: a bit ``1 << (attribute - 1)`` for each requested attribute.
        sequence: the sequence number, which the reply repeats.
    """
    request = _request(family, states, extensions)
    return request[:8] + sequence.to_bytes(4, sys.byteorder) + request[12:]


@functools.cache  # pyroute2 requires 0.3 ms to encode it
def _request(family: int, states: int, extensions: int) -> bytes:
    request = inet_diag_req()
    request["header"]["type"] = SOCK_DIAG_BY_FAMILY
    request["header"]["flags"] = NLM_F_REQUEST | NLM_F_DUMP
    request["sdiag_family"] = family
    request["sdiag_protocol"] = socket.IPPROTO_TCP
    request["idiag_states"] = states
    request["idiag_ext"] = extensions
    request.encode()
    return bytes(request.data)
