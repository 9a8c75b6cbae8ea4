# SPDX-License-Identifier: GPL-3.0-only
"""Reads the kernel's socket tables of one or more network namespaces."""

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import LISTENER, SOCKET, Records
from tcpexporter.errors import SocketTableError, SourceError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import entries
from tcpexporter.socket_tables.procfs import ProcfsReader
from tcpexporter.socket_tables.sock_diag import SockDiagReader

log = logging.getLogger(__name__)

FORGET_S = 300
"""Seconds without any socket after which a namespace is closed.

The time is long enough for a restart of a service in the namespace.
"""


class TableReader(Protocol):
    """Reads the sockets of one network namespace from one kind of table."""

    name: str
    """The value of ``--source`` that selects this kind of table."""
    netns: int
    """The inode of the namespace."""

    def entries(self, *, with_ages: bool) -> Iterator[Records]:
        """Read the sockets in state ESTABLISHED or LISTEN, in chunks of dtype `ENTRY`.

        Raises:
            SocketTableError: the table cannot be read, or has an unknown format.
        """
        ...

    def listening(self) -> Iterable[Records]:
        """Read only the sockets in state LISTEN, in chunks of dtype `ENTRY`.

        The chunks may be those of the previous call, if nothing has changed. Another thread
        may read `entries` at the same time.

        Raises:
            SocketTableError: the table cannot be read, or has an unknown format.
        """
        ...

    def close(self) -> None:
        """Close the descriptors of the reader."""
        ...


class SocketTables:
    """The socket tables of one or more network namespaces.

    A reader holds its namespace open. The kernel keeps an open namespace and its devices
    even after its container has ended. So `established` closes the reader of a namespace
    that has had no socket for `FORGET_S` seconds. It never closes the first reader or the
    reader of a namespace that has a name.
    """

    def __init__(self, readers: Sequence[TableReader]) -> None:
        """Use these readers, one per namespace; only `close` closes the first reader."""
        self.name = readers[0].name
        self._readers = list(readers)
        self._used_s = {reader.netns: time.monotonic() for reader in readers}
        # A reader can do only one dump of each kind at a time. The second lock also keeps
        # each reader open while its listeners are read.
        self._dump_lock = threading.Lock()
        self._listeners_lock = threading.Lock()
        self._listening: Sequence[Records] = ()
        self._listeners: Records = np.empty(0, LISTENER)
        """What `listeners` has returned for them."""

    def close(self) -> None:
        """Close all descriptors."""
        for reader in self._readers:
            reader.close()

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """Return the inodes of the namespaces that are read and held open.

        The first one is the namespace of --netns, or that of the exporter. Any thread may
        call this.
        """
        return np.array([reader.netns for reader in self._readers], np.uint32)

    def established(self, *, with_ages: bool = True) -> Records:
        """Read the connections in state ESTABLISHED, of dtype `SOCKET`.

        A connection is inbound if its network namespace has a listener at its local port.
        ``cookie`` is 0 if the tables are read from procfs.

        A dump can miss or repeat a connection that is established all the time. A dump
        requires several system calls, and the kernel continues at a position in a hash
        bucket. If a socket is added to or removed from that bucket between two calls,
        another socket of the bucket can be missed or repeated (tcp_diag_dump and
        tcp_get_idx in the kernel's net/ipv4).

        Args:
            with_ages: whether to request ages; the kernel then sends five times as much
                data. With ages, ``established_ns`` is the time of this dump minus the age:
                the connection was established then or before. Without, it is the time of
                this dump.

        Raises:
            SocketTableError: a table cannot be read, or has an unknown format.
        """
        found = []
        used = set()
        with self._dump_lock:
            for reader in self._readers:
                connections, has_listeners = entries.connections(
                    reader.entries(with_ages=with_ages)
                )
                found.append(connections)
                if has_listeners or len(connections):
                    used.add(reader.netns)
            self._close_unused(used)
        return entries.concatenate(found, SOCKET)

    def batches(self, *, with_ages: bool = True) -> Generator[Records, None, None]:
        """Read the same as `established`, many connections at a time.

        The listeners are read before the connections. So a connection whose listener is
        newer may be outbound.

        Args:
            with_ages: as for `established`.

        Yields:
            Connections of dtype `SOCKET`. A batch shows what the tables had when the
            iterator was advanced to it, or later.

        Raises:
            SocketTableError: a table cannot be read, or has an unknown format.
        """
        if self.name == "procfs":  # reading its listeners would read everything twice
            yield self.established(with_ages=with_ages)
            return
        with self._dump_lock:
            for reader in self._readers:
                with self._listeners_lock:
                    has_listener = entries.listening_ports(reader.listening())
                chunks = reader.entries(with_ages=with_ages)
                yield from entries.batches(chunks, has_listener)

    def listeners(self) -> Records:
        """Read the listening ports, of dtype `LISTENER`, each once.

        The array is that of the previous call, if nothing has changed. Another thread may
        be in `established` at the same time.

        Raises:
            SocketTableError: a table cannot be read, or has an unknown format.
        """
        with self._listeners_lock:
            chunks = [each for reader in self._readers for each in reader.listening()]
            if [*map(id, chunks)] != [*map(id, self._listening)]:
                found = [entries.listeners(each) for each in chunks]
                joined = entries.concatenate(found, LISTENER)
                self._listeners = entries.distinct_listeners(joined)
                self._listening = chunks
            return self._listeners

    def _close_unused(self, used: set[int]) -> None:
        """Close the readers of namespaces that have been unused for `FORGET_S` seconds."""
        if len(self._readers) == 1:
            return  # no reader to close; reading names would require a free descriptor
        now_s = time.monotonic()
        used |= {self._readers[0].netns, *namespaces.named()}
        self._used_s.update(dict.fromkeys(used, now_s))
        unused = [
            reader
            for reader in self._readers[1:]
            if now_s - self._used_s[reader.netns] > FORGET_S
        ]
        with self._listeners_lock:
            # The list is replaced in one step, because another thread may call
            # `namespaces`. It is replaced before the readers are closed: afterwards a new
            # namespace can get the inode of a closed one.
            self._readers = [each for each in self._readers if each not in unused]
            for reader in unused:
                reader.close()


def open_tables(name: str, netns: str, *, with_cgroups: bool = False) -> SocketTables:
    """Open socket tables. This requires root for any namespace except the exporter's own.

    Args:
        name: ``sock_diag``, ``procfs``, or ``auto`` for the first of them that works.
        netns: a name or path as `namespaces.find` accepts it, or ``all`` for every
            namespace that exists now.
        with_cgroups: whether to read the cgroups of sockets; procfs does not have them.

    Raises:
        SettingsError: ``netns`` is not a network namespace.
        SocketTableError: the tables cannot be read; the error has the cause and a remedy.
    """
    if name == "auto":
        try:
            return open_tables("sock_diag", netns, with_cgroups=with_cgroups)
        except SocketTableError as error:
            log.warning("reading /proc/net/tcp instead of sock_diag: %s", error)
            return open_tables("procfs", netns)
    reader: Callable[[Path], TableReader] = ProcfsReader
    if name == "sock_diag":
        reader = partial(SockDiagReader, with_cgroups=with_cgroups)
    if netns != "all":
        return SocketTables([reader(namespaces.find(netns))])
    return SocketTables([reader(namespaces.OWN), *_open_others(reader)])


def _open_others(reader: Callable[[Path], TableReader]) -> list[TableReader]:
    """Open a reader for each namespace except the exporter's own.

    Several processes and names can refer to one namespace. The first path that can be
    opened is used.
    """
    readers: dict[int, TableReader] = {}
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
        if opened.netns in {
            own,
            *readers,
        }:  # the process has changed its namespace meanwhile
            opened.close()
        else:
            readers[opened.netns] = opened
    for number in failures.keys() - readers.keys():
        log.warning(
            "pre-existing connections of a network namespace are not counted: %s",
            failures[number],
        )
    return list(readers.values())
