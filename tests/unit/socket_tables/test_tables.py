# SPDX-License-Identifier: GPL-3.0-only
"""The socket tables of several namespaces, and those of this kernel."""

import socket
from pathlib import Path

import pytest
from pyroute2.netlink.diag import SS_ESTABLISHED, SS_LISTEN

from tcpexporter.connections.record import Direction, directions
from tcpexporter.errors import SettingsError, SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables import tables as sockets
from tcpexporter.socket_tables.procfs import ProcfsReader
from tcpexporter.socket_tables.sock_diag import SockDiagReader
from tcpexporter.socket_tables.tables import SocketTables, TableReader, open_tables
from tests.support import Peers
from tests.unit.socket_tables.samples import SO_COOKIE, SOURCES, MadeReader


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


@pytest.mark.parametrize("name", SOURCES)
def test_listeners_are_read_while_a_look_is_taken(name: str) -> None:
    """A scrape in the middle of a look: both are whole, and neither waits for the other."""
    with Peers() as peers:
        peers.connect(3)
        reader: TableReader = (SockDiagReader if name == "sock_diag" else ProcfsReader)(
            namespaces.OWN
        )
        look = reader.entries(with_ages=True)
        found = [next(look).copy()]
        assert sum(len(chunk) for chunk in reader.listening()) >= 1
        found += [chunk.copy() for chunk in look]
        reader.close()
    here = [chunk[chunk["key"]["local_port"] == peers.port] for chunk in found]
    assert sum(len(chunk) for chunk in here) == 4


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
        assert each["cookie"].tobytes() == told


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
