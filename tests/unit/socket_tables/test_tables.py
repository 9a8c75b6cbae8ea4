# SPDX-License-Identifier: GPL-3.0-only
"""The socket tables of several namespaces, defined by a test or read from this kernel."""

import contextlib
import itertools
import socket
from pathlib import Path

import numpy as np
import pytest
from pyroute2.netlink.diag import SS_ESTABLISHED, SS_LISTEN

from tcpexporter.connections.parts import Direction
from tcpexporter.errors import SettingsError, SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables.procfs import ProcfsReader
from tcpexporter.socket_tables.sock_diag import SockDiagReader
from tcpexporter.socket_tables.tables import SocketTables, TableReader, open_tables
from tests.support import Peers
from tests.unit.socket_tables.samples import SO_COOKIE, SOURCES, MadeReader

MODULE = "tcpexporter.socket_tables.tables"


def test_a_listener_makes_only_its_own_namespace_inbound() -> None:
    """The listener may come before or after the connections in a dump."""
    here = MadeReader(1, (443, SS_ESTABLISHED), (443, SS_LISTEN), (443, SS_ESTABLISHED))
    there = MadeReader(2, (443, SS_ESTABLISHED), (80, SS_LISTEN))
    found = SocketTables([here, there]).established()
    assert found["key"]["netns"].tolist() == [1, 1, 2]
    assert found["is_outbound"].tolist() == [
        Direction.INBOUND,
        Direction.INBOUND,
        Direction.OUTBOUND,
    ]


def test_listeners_are_not_repeated() -> None:
    """Several sockets listen at one port with SO_REUSEPORT: it is returned once."""
    here = MadeReader(1, *[(443, SS_LISTEN)] * 3, (80, SS_LISTEN))
    there = MadeReader(2, (443, SS_LISTEN))
    listeners = SocketTables([here, there]).listeners()
    assert listeners.tolist() == [(1, 80, 4, 0), (1, 443, 4, 0), (2, 443, 4, 0)]


def test_unchanged_listeners_are_decoded_once() -> None:
    """sock_diag numbers the replies of each dump; the rest of a reply is the same.

    Other processes may open a listener meanwhile, but not all the time.
    """
    with Peers(), contextlib.closing(open_tables("sock_diag", "self")) as tables:
        found = [tables.listeners() for _ in range(13)]
        assert any(one is other for one, other in itertools.pairwise(found))
        with Peers():
            assert tables.listeners() is not found[-1]


def test_tables_without_sockets_are_empty() -> None:
    """They return arrays of the right dtype and of length 0."""
    tables = SocketTables([MadeReader(1)])
    assert tables.established()["established_ns"].tolist() == []
    assert tables.listeners()["port"].tolist() == []


def test_closing_tables_closes_all_readers() -> None:
    """No descriptor of a namespace stays open."""
    readers = [MadeReader(netns) for netns in (1, 2, 3)]
    SocketTables(readers).close()
    assert all(reader.closed for reader in readers)


@pytest.mark.parametrize("name", SOURCES)
def test_listeners_can_be_read_during_a_dump(name: str) -> None:
    """Both results are complete, and neither waits for the other.

    A socket may be in /proc/net/tcp twice, if others open or close meanwhile.
    """
    with Peers() as peers:
        peers.connect(3)
        reader: TableReader = (SockDiagReader if name == "sock_diag" else ProcfsReader)(
            namespaces.OWN
        )
        dump = reader.entries(with_ages=True)
        found = [next(dump).copy()]
        assert sum(len(chunk) for chunk in reader.listening()) >= 1
        found += [chunk.copy() for chunk in dump]
        reader.close()
    keys = np.concatenate(found)["key"]
    here = keys[keys["local_port"] == peers.port]
    assert len({*here["remote_port"].tolist()}) == 3 + 1  # the listener has remote port 0


@pytest.mark.parametrize("name", SOURCES)
def test_this_kernel_answers(name: str) -> None:
    """Each kind of table has the connections of a test, and requires no root."""
    with Peers() as peers:
        peers.connect(3)
        tables = open_tables(name, "self")
        found = tables.established()
        listeners = tables.listeners()
        tables.close()
    assert tables.name == name
    at_port = found[found["key"]["local_port"] == peers.port]
    assert at_port["is_outbound"].tolist() == [Direction.INBOUND] * 3
    assert (namespaces.inode(), peers.port, 4, 0) in listeners.tolist()


@pytest.mark.parametrize("name", SOURCES)
def test_a_connection_has_the_cookie_of_its_socket(name: str) -> None:
    """It equals SO_COOKIE of the socket, socket(7), and is 0 from procfs."""
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
        expected = (
            owners[int(each["key"]["remote_port"])] if name == "sock_diag" else bytes(8)
        )
        assert each["cookie"].tobytes() == expected


class NoSockDiag:
    """A reader that cannot be opened."""

    def __init__(self, _netns: Path, *, with_cgroups: bool) -> None:  # noqa: ARG002
        raise SocketTableError("modprobe tcp_diag may help")


def test_auto_reads_procfs_if_sock_diag_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line is logged with the reason. With ``sock_diag`` this is an error instead."""
    tables = open_tables("auto", "self")
    assert (tables.name, caplog.text) == ("sock_diag", "")
    tables.close()
    monkeypatch.setattr(f"{MODULE}.SockDiagReader", NoSockDiag)
    tables = open_tables("auto", "self")
    assert tables.name == "procfs"
    tables.close()
    assert "modprobe tcp_diag may help" in caplog.text
    with pytest.raises(SocketTableError, match="modprobe"):
        open_tables("sock_diag", "self")


def test_a_missing_namespace_is_an_error() -> None:
    """The error has its path."""
    with pytest.raises(
        SettingsError, match=r"no network namespace /run/netns/none-such \("
    ):
        open_tables("procfs", "none-such")


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("sock_diag", "sock_diag in ", ": start as root, or use --netns self"),
        ("procfs", "", ""),
    ],
)
def test_a_namespace_that_cannot_be_entered_is_an_error(
    name: str, what: str, remedy: str
) -> None:
    """The error has the path and the kernel's reason, here EINVAL of setns(2)."""
    reader = SockDiagReader if name == "sock_diag" else ProcfsReader
    with pytest.raises(SocketTableError) as caught:
        reader(Path("/dev/null"))
    assert str(caught.value) == f"cannot open {what}/dev/null: Invalid argument{remedy}"


def test_a_namespace_without_sockets_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace with sockets or a name stays open, and so does the first one."""
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
    monkeypatch.setattr(f"{MODULE}.FORGET_S", 0)
    tables.established()
    assert tables.namespaces().tolist() == [1, 3, 4]
    assert [each.closed for each in (first, empty, used, named)] == [
        False,
        True,
        False,
        False,
    ]
