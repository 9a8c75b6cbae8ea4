# SPDX-License-Identifier: GPL-3.0-only
"""Reads /proc/net/tcp and /proc/net/tcp6."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tcpexporter.connections.record import Records
from tcpexporter.connections.sets import is_in
from tcpexporter.errors import SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables.entries import (
    ENTRY,
    TCP_ESTABLISHED,
    TCP_LISTEN,
    Bytes,
    v4_mapped,
)
from tcpexporter.socket_tables.netns_thread import run_in_netns

PIECE_BYTES = 1 << 20
"""Number of bytes of a file that are read at once."""

FILES = {
    1: ("/proc/net/tcp", [b"sl", b"local_address", b"rem_address", b"st"]),
    4: ("/proc/net/tcp6", [b"sl", b"local_address", b"remote_address", b"st"]),
}
"""Name and first headings of a file, by the number of 32-bit words of an address."""

_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789ABCDEF", np.uint8)] = np.arange(16)


class ProcfsReader:
    """Reads the sockets of one network namespace from /proc/net/tcp and tcp6."""

    name = "procfs"

    def __init__(self, netns: Path) -> None:
        """Open the files. An open file shows the namespace in which it was opened.

        Raises:
            SocketTableError: the namespace cannot be entered, or a file cannot be opened.
        """
        with contextlib.ExitStack() as opened, namespaces.opened(netns) as descriptor:
            self.netns = os.fstat(descriptor).st_ino
            try:
                self._for_entries = run_in_netns(descriptor, _open_files)
                opened.callback(_close_files, self._for_entries)
                self._for_listening = run_in_netns(descriptor, _open_files)
                opened.callback(_close_files, self._for_listening)
            except OSError as error:
                # If the namespace refuses the thread, the error has no file name.
                raise SocketTableError(
                    f"cannot open {error.filename or netns}: {error.strerror}"
                ) from error
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002  no ages here
        return self._read(self._for_entries, TCP_ESTABLISHED, TCP_LISTEN)

    def listening(self) -> Iterator[Records]:
        return self._read(self._for_listening, TCP_LISTEN)

    def _read(self, files: dict[int, int], *states: int) -> Iterator[Records]:
        for address_words, descriptor in files.items():
            name, _ = FILES[address_words]
            pieces = _pieces(descriptor, name)
            for entries in decode_file(pieces, address_words, self.netns):
                yield entries[is_in(entries["state"], states)]


def _open_files() -> dict[int, int]:
    """Open the files; return descriptors by the number of 32-bit words of an address."""
    # /proc/thread-self shows the namespace of this thread; /proc/self that of the main
    # thread.
    files = {1: os.open("/proc/thread-self/net/tcp", os.O_RDONLY)}
    try:
        files[4] = os.open("/proc/thread-self/net/tcp6", os.O_RDONLY)
    except FileNotFoundError:
        pass  # a kernel without IPv6
    except OSError:
        _close_files(files)
        raise
    return files


def _close_files(files: dict[int, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def _pieces(descriptor: int, name: str) -> Iterator[bytes]:
    """Yield the content of a file from its start, in pieces; errors have its name."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        while piece := os.read(descriptor, PIECE_BYTES):
            yield piece
    except OSError as error:
        raise SocketTableError(f"cannot read {name}: {error.strerror}") from error


def decode_file(
    pieces: Iterable[bytes], address_words: int, netns: int
) -> Iterator[Records]:
    """Decode /proc/net/tcp or tcp6, in chunks of dtype `ENTRY`.

    Args:
        pieces: the text, split anywhere.
        address_words: the number of 32-bit words of an address: 1 for tcp, 4 for tcp6.
        netns: the inode of the namespace, for the keys of the entries.

    Raises:
        SocketTableError: the heading or a line is malformed; the error names the byte.
    """
    name, columns = FILES[address_words]
    begin, rest = 0, b""
    for piece in pieces:
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if not newline:
            continue
        text = whole + newline
        if not begin:
            heading, _, text = text.partition(b"\n")
            if heading.split()[: len(columns)] != columns:
                raise SocketTableError(f"{name}: unknown columns at byte 0")
            begin = len(heading) + 1
        yield decode_lines(text, address_words, netns, begin)
        begin += len(text)
    if rest or not begin:
        raise SocketTableError(f"{name}: incomplete line at byte {begin}")


def decode_lines(text: bytes, address_words: int, netns: int, begin: int = 0) -> Records:
    """Decode whole lines to dtype `ENTRY`.

    Only the first columns are read: ``sl: local rem st``. All kernels have these columns
    (proc_net_tcp in the kernel's Documentation/networking).

    Args:
        text: lines, each with its line feed.
        address_words: as for `decode_file`.
        netns: the inode of the namespace, for the keys of the entries.
        begin: the byte of the file at which ``text`` begins, for messages.

    Raises:
        SocketTableError: a line is malformed; the error names the byte.
    """
    name, _ = FILES[address_words]
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
    return _entries(octets, address_words, netns)


def _entries(octets: Bytes, address_words: int, netns: int) -> Records:
    """Convert the bytes of each line (address, port, address, port, state) to entries."""
    entries = np.zeros(len(octets), ENTRY)
    address_bytes = 4 * address_words
    for end, at in (("local", 0), ("remote", address_bytes + 2)):
        # The kernel prints each word of an address as a number in host byte order.
        numbers = np.ascontiguousarray(octets[:, at : at + address_bytes]).view(">u4")
        address = numbers.astype("=u4").view(np.uint8)
        entries["key"][f"{end}_address"] = (
            v4_mapped(address) if address_words == 1 else address
        )
        port = np.ascontiguousarray(octets[:, at + address_bytes : at + address_bytes + 2])
        entries["key"][f"{end}_port"] = port.view(">u2")[:, 0]
    entries["key"]["netns"] = netns
    entries["state"] = octets[:, -1]
    return entries
