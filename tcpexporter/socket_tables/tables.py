# SPDX-License-Identifier: GPL-3.0-only
"""What the kernel's socket tables say now: sock_diag, else /proc/net/tcp and tcp6."""

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.record import (
    CONNECTION,
    IPV4_PREFIX,
    KEY,
    LISTENER,
    PORTS,
    Direction,
    Records,
    groups,
    ip_versions,
)
from tcpexporter.errors import SocketTableError, SourceError
from tcpexporter.host import background, namespaces
from tcpexporter.lean import part_of

with part_of("pyroute2"):  # all of it takes 8 MiB more
    from pyroute2 import netns as pyroute2_netns
    from pyroute2.netlink import (
        NETLINK_SOCK_DIAG,
        NLM_F_DUMP,
        NLM_F_REQUEST,
        NLMSG_DONE,
        NLMSG_ERROR,
    )
    from pyroute2.netlink.diag import (
        SOCK_DIAG_BY_FAMILY,
        SS_ESTABLISHED,
        SS_LISTEN,
        inet_diag_req,
    )

log = logging.getLogger(__name__)

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

DATAGRAM_BYTES = 65536
"""More than one datagram of a dump, 32 KiB (netlink_dump in net/netlink/af_netlink.c)."""

REPLY_BYTES = 8 * DATAGRAM_BYTES
"""That are taken apart at once."""

FEW = 64
"""Messages, of many, that are looked at whether they are alike before all are."""

REPLY_TIMEOUT_S = 10

FORGET_S = 300
"""How long a namespace may be without any socket: a service in it may be restarting."""

PIECE_BYTES = 1 << 20

ENTRY = np.dtype(
    [("key", KEY), ("state", "u1"), ("v6only", "?"), ("age_ns", "i8"), ("cookie", "u8")]
)
"""A socket as either table tells of it.

``state`` is a TCP state; ``v6only`` is of a listener; ``age_ns`` is how long a
connection has been established at least, and ``cookie`` the number that no other socket
gets until the host boots again: 0 where the table does not tell.
"""

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
"""Length, type, flags and sequence; netlink(7)."""

NETLINK_HEADER_BYTES = 16

DONE_BYTES = NETLINK_HEADER_BYTES + 4
"""The header, and whether the dump has failed."""

INET_DIAG_INFO = 2
INET_DIAG_SKV6ONLY = 11

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
"""The part of ``struct tcp_info`` that ages are taken from: include/uapi/linux/tcp.h."""

TCPI_OPT_SYN_DATA = 32

JIFFY_NS = 10_000_000
"""The longest there is, at HZ=100: by up to one a difference of two is too large."""


class Reader(Protocol):
    """The sockets of one network namespace, from one kind of table."""

    name: str
    """As ``--source`` has it."""
    netns: int
    """Inode of the namespace."""

    def entries(self, *, with_ages: bool) -> Iterator[Records]:
        """The sockets in state ESTABLISHED or LISTEN, in chunks of dtype `ENTRY`."""
        ...

    def listening(self) -> Iterator[Records]:
        """Those in state LISTEN alone; another thread may read `entries` meanwhile."""
        ...

    def close(self) -> None:
        """Give its descriptors back."""
        ...


class SocketTables:
    """The tables of one or more network namespaces.

    A reader holds its namespace, and the kernel keeps what is held: the devices
    of a container that is long gone, too. So one of several that has had no socket
    for a while is let go, unless the namespace has a name.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        """Read through these; the first is of the namespace that is never let go."""
        self.name = readers[0].name
        self._readers = list(readers)
        self._used_s = {reader.netns: time.monotonic() for reader in readers}
        # One at a time; and not let go while it is asked for its listeners.
        self._looking = threading.Lock()
        self._listening = threading.Lock()

    def close(self) -> None:
        """Give all descriptors back."""
        for reader in self._readers:
            reader.close()

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """The inodes of the namespaces that are read, and so held; from any thread.

        The first is that of --netns, or our own.
        """
        return np.array([reader.netns for reader in self._readers], np.uint32)

    def established(self, *, with_ages: bool = True) -> Records:
        """The connections in state ESTABLISHED, of dtype `CONNECTION`.

        ``established_ns`` is when each was seen, on CLOCK_BOOTTIME, or ``with_ages`` as
        long before as the table can tell: it was established then or before. That makes
        the kernel tell five times as much. A connection is inbound when its local port is
        listened on in its network namespace. ``handle`` is the cookie of its socket, 0 from
        procfs: sock_gen_cookie in the kernel's net/core/sock_diag.c.

        What is there throughout is nearly always seen, and nearly always once.
        The kernel goes on by position from one part of a dump to the next: a
        change in the same hash bucket can hide or repeat a neighbour
        (tcp_diag_dump and tcp_get_idx in the kernel's net/ipv4).

        Raises:
            SocketTableError: they cannot be read, or not understood.
        """
        found = []
        used = set()
        with self._looking:
            for reader in self._readers:
                connections, has_listeners = _established(reader, with_ages=with_ages)
                found.append(connections)
                if has_listeners or len(connections):
                    used.add(reader.netns)
            self._let_go(used)
        return _joined(found, CONNECTION)

    def listeners(self) -> Records:
        """The listening ports, of dtype `LISTENER`, without repetitions.

        Another thread may be in `established` meanwhile.

        Raises:
            SocketTableError: they cannot be read, or not understood.
        """
        with self._listening:
            found = [
                _listeners(entries)
                for reader in self._readers
                for entries in reader.listening()
            ]
        return np.unique(_joined(found, LISTENER))

    def _let_go(self, used: set[int]) -> None:
        if len(self._readers) == 1:
            return  # nor are names read then, which a process without descriptors cannot
        now_s = time.monotonic()
        used |= {self._readers[0].netns, *namespaces.named()}
        self._used_s.update(dict.fromkeys(used, now_s))
        unused = [
            reader
            for reader in self._readers[1:]
            if now_s - self._used_s[reader.netns] > FORGET_S
        ]
        with self._listening:
            # Not one after another: `namespaces` may be called meanwhile. And before they
            # are closed: another namespace can have the inode of one that is not held.
            self._readers = [each for each in self._readers if each not in unused]
            for reader in unused:
                reader.close()


def open_tables(name: str, netns: str) -> SocketTables:
    """The socket tables to read from now on; needs root for other namespaces than ours.

    Args:
        name: ``sock_diag``, ``procfs``, or ``auto`` for the first of them that works.
        netns: as `namespaces.find` takes it, or ``all`` for every one there is now.

    Raises:
        SettingsError: that is not a network namespace.
        SocketTableError: they cannot be read; says why and what would help.
    """
    if name == "auto":
        try:
            return open_tables("sock_diag", netns)
        except SocketTableError as error:
            log.warning("reading /proc/net/tcp instead of sock_diag: %s", error)
            return open_tables("procfs", netns)
    reader = SockDiagReader if name == "sock_diag" else ProcfsReader
    if netns != "all":
        return SocketTables([reader(namespaces.find(netns))])
    return SocketTables([reader(namespaces.OWN), *_open_others(reader)])


def _open_others(reader: Callable[[Path], Reader]) -> list[Reader]:
    """One for each namespace but ours, by whichever of its processes and names works."""
    readers: dict[int, Reader] = {}
    failures: dict[int, SourceError] = {}
    own = namespaces.inode()
    for number, path in namespaces.others():
        if number in readers:
            continue
        try:
            opened = reader(path)
        except SourceError as error:
            failures[number] = error
            continue
        if opened.netns in {own, *readers}:  # the process has entered it meanwhile
            opened.close()
        else:
            readers[opened.netns] = opened
    for number in failures.keys() - readers.keys():
        log.warning(
            "connections of a network namespace from before are not seen: %s",
            failures[number],
        )
    return list(readers.values())


def _within(netns: int, act: Callable[[], T]) -> T:
    """What ``act`` gives in the network namespace of a descriptor.

    A thread enters it and ends: setns(2) moves one thread alone.

    Raises:
        ThreadError: there can be no thread.
    """
    if os.fstat(netns).st_ino == namespaces.inode():
        return act()
    outcome: list[T | Exception] = []

    def enter_and_act() -> None:
        try:
            pyroute2_netns.setns(netns)
            outcome.append(act())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=enter_and_act)
    background.start(thread)
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


class SockDiagReader:
    """The sockets of one network namespace by sock_diag(7), whole replies at a time."""

    name = "sock_diag"

    def __init__(self, netns: Path) -> None:
        """Ask once, so that what is constructed works.

        Raises:
            SocketTableError: the kernel does not answer.
        """
        with namespaces.opened(netns) as descriptor:
            self.netns = os.fstat(descriptor).st_ino
            try:
                self._for_entries = _Dumps(_within(descriptor, _netlink_socket))
                self._for_listening = _Dumps(_within(descriptor, _netlink_socket))
            except OSError as error:
                raise SocketTableError(
                    f"no sock_diag in {netns}: {error.strerror}"
                ) from error
        try:
            for _ in self.listening():
                pass
        except SocketTableError:
            self.close()
            raise

    def close(self) -> None:
        self._for_entries.close()
        self._for_listening.close()

    def entries(self, *, with_ages: bool) -> Iterator[Records]:
        states = 1 << SS_ESTABLISHED | 1 << SS_LISTEN
        extensions = 1 << (INET_DIAG_INFO - 1) if with_ages else 0
        for messages in self._for_entries.read(states, extensions):
            yield _diag_entries(messages, self.netns, with_ages=with_ages)

    def listening(self) -> Iterator[Records]:
        for messages in self._for_listening.read(1 << SS_LISTEN, 0):
            yield _diag_entries(messages, self.netns, with_ages=False)


class _Dumps:
    """A netlink socket that one dump at a time is read from.

    The kernel refuses a second dump while one is under way (EBUSY), and whoever
    reads takes the answers of both.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._sequence = 0
        self._is_under_way = False
        self.close = opened.close

    def read(self, states: int, extensions: int) -> Iterator[Bytes]:
        """Runs of messages, as `decode_sock_diag` gives them."""
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                self._finish()
                self._sequence += 1
                request = sock_diag_request(family, states, extensions, self._sequence)
                self._socket.send(request)
                self._is_under_way = True
                yield from self._replies()
        except OSError as error:
            raise SocketTableError(
                f"sock_diag does not answer ({error}): modprobe tcp_diag may help"
            ) from error

    def _finish(self) -> None:
        """Read what is left of a dump that was given up: that is, of one that failed."""
        try:
            while self._is_under_way:
                self._receive()
        finally:
            self._is_under_way = False  # if it never ends, it is not waited for again

    def _replies(self) -> Iterator[Bytes]:
        """Many datagrams are taken apart at once: each is only a hundred sockets or two.

        No thread reads ahead: it was measured to be no faster, and a thread may be refused.
        """
        while self._is_under_way:
            reply = self._receive()
            yield from self._runs(reply, is_last=not self._is_under_way)

    def _receive(self) -> Bytes:
        """A buffer full of datagrams, or as many as there are until the dump ends."""
        buffer = np.empty(REPLY_BYTES, np.uint8)
        filled = 0
        while self._is_under_way and len(buffer) - filled >= DATAGRAM_BYTES:
            room = buffer[filled:]
            datagram = room[: self._socket.recv_into(room.data)]
            if _is_of(datagram, self._sequence):  # else left from one that was given up
                filled += len(datagram)
                self._is_under_way = not _ends(datagram)
        return buffer[:filled]

    def _runs(self, reply: Bytes, *, is_last: bool) -> list[Bytes]:
        runs, has_ended = decode_sock_diag(reply, self._sequence)
        if has_ended != is_last:
            self._is_under_way = not has_ended
            raise SocketTableError(
                f"sock_diag reply: {'no' if is_last else 'an'} end at byte {len(reply)}"
            )
        return runs


def _is_of(datagram: Bytes, sequence: int) -> bool:
    """Whether it answers that request; so does what is too short to tell: it is refused."""
    if len(datagram) < NETLINK_HEADER_BYTES:
        return True
    _, _, _, answered = NETLINK_HEADER.unpack_from(datagram.data)
    return bool(answered == sequence)


def _ends(datagram: Bytes) -> bool:
    """Whether a dump ends with it: where there is room, that follows the last sockets."""
    if len(datagram) < DONE_BYTES:
        return False
    _, first, _, sequence = NETLINK_HEADER.unpack_from(datagram.data)
    last = NETLINK_HEADER.unpack_from(datagram[-DONE_BYTES:].data)
    length, kind, _, answered = last
    is_done = (length, kind, answered) == (DONE_BYTES, NLMSG_DONE, sequence)
    return is_done or first in (NLMSG_DONE, NLMSG_ERROR)


def _netlink_socket() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    # Only the kernel answers then: else who is root in the namespace, be it a container's,
    # can send to this socket too (netlink_getsockbyportid in net/netlink/af_netlink.c).
    opened.connect((0, 0))
    opened.settimeout(REPLY_TIMEOUT_S)
    return opened


def sock_diag_request(family: int, states: int, extensions: int, sequence: int) -> bytes:
    """A request for the TCP sockets of a family in any of ``states``, a bit for each.

    So are ``extensions``, the attributes that each reply is asked to have.
    """
    request = inet_diag_req()
    request["header"]["type"] = SOCK_DIAG_BY_FAMILY
    request["header"]["flags"] = NLM_F_REQUEST | NLM_F_DUMP
    request["header"]["sequence_number"] = sequence
    request["sdiag_family"] = family
    request["sdiag_protocol"] = socket.IPPROTO_TCP
    request["idiag_states"] = states
    request["idiag_ext"] = extensions
    request.encode()
    return bytes(request.data)


def decode_sock_diag(reply: Bytes, sequence: int) -> tuple[list[Bytes], bool]:
    """Take datagrams of a sock_diag dump apart.

    Returns:
        Arrays of bytes of shape (messages, length), one for each run of
        messages that are equally long, as nearly all of a dump are; and
        whether the dump is finished.

    Raises:
        SocketTableError: the kernel reports an error, or a message is malformed, or
            answers another request than ``sequence``; says at which byte.
    """
    runs: list[Bytes] = []
    offset = 0
    while offset < len(reply):
        length, kind = _message(reply, offset, sequence)
        # A dump that fails ends like one that is done, but for this number.
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
        # Not at all of them each time, where they differ in length one by one.
        few = _alike(rows[:FEW])
        rows = _alike(rows) if len(few) == FEW else few
        runs.append(rows)
        offset += rows.size
    return runs, False


def _alike(rows: Bytes) -> Bytes:
    """The first messages that are as long as the first, and of its type and request."""
    alike = (rows[:, :12] == rows[0, :12]).all(axis=1)
    return rows[: len(rows) if alike.all() else int(alike.argmin())]


def _message(reply: Bytes, offset: int, sequence: int) -> tuple[int, int]:
    """Length and type of the message there."""
    left = len(reply) - offset
    if left < NETLINK_HEADER_BYTES + 4:
        raise _malformed(offset)
    length, kind, _, answered = NETLINK_HEADER.unpack_from(reply.data, offset)
    if answered != sequence or not NETLINK_HEADER_BYTES + 4 <= length <= left:
        raise _malformed(offset)
    return length, kind


def _malformed(offset: int) -> SocketTableError:
    return SocketTableError(f"sock_diag reply: malformed message at byte {offset}")


def _diag_entries(rows: Bytes, netns: int, *, with_ages: bool = True) -> Records:
    messages = np.ascontiguousarray(rows[:, : DIAG_MESSAGE.itemsize]).view(DIAG_MESSAGE)[
        :, 0
    ]
    entries = np.zeros(len(messages), ENTRY)
    is_ipv4 = messages["family"] == socket.AF_INET
    for end in ("local", "remote"):
        address = entries["key"][f"{end}_address"]
        address[:] = messages[f"{end}_address"]
        address[is_ipv4] = _mapped(address[is_ipv4, :4])
        entries["key"][f"{end}_port"] = messages[f"{end}_port"]
    entries["key"]["netns"] = netns
    entries["state"] = messages["state"]
    entries["cookie"] = messages["cookie"]
    is_listener = messages["state"] == SS_LISTEN
    if is_listener.any():
        has, v6only = _attribute(rows, INET_DIAG_SKV6ONLY, 1)
        entries["v6only"][has] = v6only[:, 0] != 0
    if with_ages and not is_listener.all():
        has, info = _attribute(rows, INET_DIAG_INFO, TCP_INFO.itemsize)
        entries["age_ns"][has] = _lowest_ages_ns(info.view(TCP_INFO)[:, 0])
    return entries


def _attribute(rows: Bytes, kind: int, size: int) -> tuple[npt.NDArray[np.intp], Bytes]:
    """The beginning of an attribute's payload, in those messages that have that much of it.

    Returns:
        The indices of those messages, and the bytes, of shape (indices, size).
    """
    # Everything lies at a multiple of 4: words are a quarter of the work of bytes.
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
    """The word at which each message has that attribute's payload, 0 where it has none."""
    payload_at = np.zeros(len(words), np.intp)
    position = DIAG_MESSAGE.itemsize // 4
    while position + -(-size // 4) < words.shape[1]:
        headers = words[:, position]
        if (headers != headers[0]).any():
            return _payloads_walked_apart(words, kind, size)
        length, found = (int(each) for each in headers[:1].view(np.uint16))
        if found == kind and length >= 4 + size:
            payload_at[:] = position + 1
        position += max((length + 3) // 4, 1)
    return payload_at


def _payloads_walked_apart(
    words: npt.NDArray[np.uint32], kind: int, size: int
) -> npt.NDArray[np.intp]:
    """The same where not all messages have the same attributes.

    All are walked at once, one attribute further each time.
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
    """How long connections have been established at least, from dtype `TCP_INFO`.

    Each of these is counted from when the connection was established, or later:

    - last_data_sent: tcp_finish_connect and tcp_rcv_state_process set ``lsndtime``
      when they establish it;
    - last_data_recv: tcp_finish_connect and tcp_create_openreq_child set ``lrcvtime``;
      the latter at the SYN, too early, when that carried data (TCP Fast Open);
    - last_ack_recv: tcp_ack sets ``rcv_tstamp``, at the latest for the handshake;
    - busy_time: how long there was data on the way, likewise but for Fast Open.

    Read in the kernel's net/ipv4, v4.10 to v6.18. They are counted in jiffies, which
    stop in suspend and wrap: both make them smaller.
    """
    by_sender = np.maximum(info["last_data_sent_ms"], info["last_ack_recv_ms"])
    by_all = np.maximum(by_sender, info["last_data_recv_ms"])
    has_syn_data = info["options"] & TCPI_OPT_SYN_DATA != 0
    age_ns = np.where(has_syn_data, by_sender, by_all).astype(np.int64) * 1_000_000
    busy_ns = np.where(has_syn_data, 0, info["busy_time_us"]).astype(np.int64) * 1_000
    ages_ns: npt.NDArray[np.int64] = np.maximum(age_ns, busy_ns) - JIFFY_NS
    return np.maximum(ages_ns, 0)


class ProcfsReader:
    """The sockets of one network namespace by /proc/net/tcp and tcp6, a piece at a time."""

    name = "procfs"

    def __init__(self, netns: Path) -> None:
        """Open the files, which stay those of the namespace.

        Raises:
            SocketTableError: they cannot be opened.
        """
        with namespaces.opened(netns) as descriptor:
            self.netns = os.fstat(descriptor).st_ino
            try:
                self._for_entries = _within(descriptor, _open_procfs)
                self._for_listening = _within(descriptor, _open_procfs)
            except OSError as error:
                raise SocketTableError(
                    f"cannot open {error.filename}: {error.strerror}"
                ) from error

    def close(self) -> None:
        for descriptor in (*self._for_entries.values(), *self._for_listening.values()):
            os.close(descriptor)

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002  it has none
        return self._read(self._for_entries, SS_ESTABLISHED, SS_LISTEN)

    def listening(self) -> Iterator[Records]:
        return self._read(self._for_listening, SS_LISTEN)

    def _read(self, files: dict[int, int], *states: int) -> Iterator[Records]:
        for address_words, descriptor in files.items():
            pieces = _pieces(descriptor)
            for entries in decode_procfs_table(pieces, address_words, self.netns):
                yield entries[np.isin(entries["state"], states)]


def _open_procfs() -> dict[int, int]:
    """A descriptor of each table, by how many words its addresses have."""
    # thread-self: that of the thread which has entered the namespace
    files = {1: os.open("/proc/thread-self/net/tcp", os.O_RDONLY)}
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        files[4] = os.open("/proc/thread-self/net/tcp6", os.O_RDONLY)
    return files


def _pieces(descriptor: int) -> Iterator[bytes]:
    """A table from its start."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        while piece := os.read(descriptor, PIECE_BYTES):
            yield piece
    except OSError as error:
        raise SocketTableError(f"cannot read /proc/net/tcp: {error.strerror}") from error


PROCFS_TABLES = {
    1: ("/proc/net/tcp", [b"sl", b"local_address", b"rem_address", b"st"]),
    4: ("/proc/net/tcp6", [b"sl", b"local_address", b"remote_address", b"st"]),
}
"""By how many words the addresses have: their names, and the first columns' headings."""


def decode_procfs_table(
    pieces: Iterable[bytes], address_words: int, netns: int
) -> Iterator[Records]:
    """All of /proc/net/tcp (one address word) or tcp6 (four), many lines at a time.

    Args:
        pieces: of the text, cut anywhere.
        address_words: which table it is.
        netns: of the entries, which have dtype `ENTRY`.

    Raises:
        SocketTableError: the heading or a line is not as it should be; says at which byte.
    """
    name, columns = PROCFS_TABLES[address_words]
    begin, rest = 0, b""
    for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if not newline:
            continue
        text = whole + newline
        if not begin:
            heading, _, text = text.partition(b"\n")
            if heading.split()[: len(columns)] != columns:
                raise SocketTableError(f"{name}: other columns than known at byte 0")
            begin = len(heading) + 1
        yield decode_procfs(text, address_words, netns, begin)
        begin += len(text)
    if rest or not begin:
        raise SocketTableError(f"{name}: torn line at byte {begin}")


_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789ABCDEF", np.uint8)] = np.arange(16)


def decode_procfs(text: bytes, address_words: int, netns: int, begin: int = 0) -> Records:
    """Whole lines of a table, which ``begin`` at that byte of it, as dtype `ENTRY`.

    Only the first columns are read, ``sl: local rem st``, which no kernel has
    changed (proc_net_tcp in the kernel's Documentation/networking).

    Raises:
        SocketTableError: a line is malformed; says at which byte.
    """
    name, _ = PROCFS_TABLES[address_words]
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    template = b": %s:HHHH %s:HHHH HH" % ((b"H" * 8 * address_words,) * 2)
    columns = np.frombuffer(template, np.uint8)
    colons = np.flatnonzero(data == ord(":"))
    index = np.searchsorted(colons, starts)
    first = np.append(colons, len(data))[index]
    if len(short := np.flatnonzero(first + len(columns) > ends)):
        raise SocketTableError(f"{name}: short line at byte {begin + starts[short[0]]}")
    fields = data[first[:, None] + np.arange(len(columns))]
    is_hex = columns == ord("H")
    nibbles: Bytes = _NIBBLES[fields[:, is_hex]]
    wrong = (nibbles == 255).any(axis=1) | (fields != columns)[:, ~is_hex].any(axis=1)
    if wrong.any():
        raise SocketTableError(
            f"{name}: malformed line at byte {begin + starts[wrong.argmax()]}"
        )
    octets: Bytes = nibbles[:, ::2] << np.uint8(4) | nibbles[:, 1::2]
    return _procfs_entries(octets, address_words, netns)


def _procfs_entries(octets: Bytes, address_words: int, netns: int) -> Records:
    entries = np.zeros(len(octets), ENTRY)
    address_bytes = 4 * address_words
    for end, at in (("local", 0), ("remote", address_bytes + 2)):
        # Each word is printed as the number that its bytes are to this host.
        numbers = np.ascontiguousarray(octets[:, at : at + address_bytes]).view(">u4")
        address = numbers.astype("=u4").view(np.uint8)
        entries["key"][f"{end}_address"] = (
            _mapped(address) if address_words == 1 else address
        )
        port = np.ascontiguousarray(octets[:, at + address_bytes : at + address_bytes + 2])
        entries["key"][f"{end}_port"] = port.view(">u2")[:, 0]
    entries["key"]["netns"] = netns
    entries["state"] = octets[:, -1]
    return entries


def _mapped(ipv4: Bytes) -> Bytes:
    """IPv4 addresses, four bytes each, as ::ffff:a.b.c.d."""
    return np.hstack([np.broadcast_to(IPV4_PREFIX, (len(ipv4), len(IPV4_PREFIX))), ipv4])


def _established(reader: Reader, *, with_ages: bool) -> tuple[Records, bool]:
    """The connections of a namespace, and whether it has listeners."""
    connections = []
    listened = np.zeros(PORTS, np.bool_)
    for entries in reader.entries(with_ages=with_ages):
        is_listener = entries["state"] == SS_LISTEN
        listened[entries["key"]["local_port"][is_listener]] = True
        established = entries[entries["state"] == SS_ESTABLISHED]
        found = np.zeros(len(established), CONNECTION)
        found["key"] = established["key"]
        found["handle"] = established["cookie"]
        now_ns = boottime_ns()
        found["established_ns"] = np.maximum(now_ns - established["age_ns"], 0)
        connections.append(found)
    joined = _joined(connections, CONNECTION)
    is_inbound = listened[joined["key"]["local_port"]]
    joined["group"] = groups(
        joined["key"], np.where(is_inbound, Direction.INBOUND, Direction.OUTBOUND)
    )
    return joined, bool(listened.any())


def _listeners(entries: Records) -> Records:
    """A listener for each IP version that a socket accepts: :: takes both, if it may."""
    versions = ip_versions(entries["key"])
    is_any = (entries["key"]["local_address"] == 0).all(axis=1)
    takes_both = is_any & ~entries["v6only"]
    listeners = np.zeros(len(entries) + int(takes_both.sum()), LISTENER)
    listeners["netns"] = np.concatenate(
        [entries["key"]["netns"], entries["key"]["netns"][takes_both]]
    )
    ports = entries["key"]["local_port"]
    listeners["port"] = np.concatenate([ports, ports[takes_both]])
    listeners["ip_version"] = 4
    listeners["ip_version"][: len(entries)] = versions
    return listeners


def _joined(chunks: list[Records], dtype: np.dtype[np.void]) -> Records:
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)
