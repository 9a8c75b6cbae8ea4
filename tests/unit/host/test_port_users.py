# SPDX-License-Identifier: GPL-3.0-only
"""Which process listens at a port, from a copy of /proc."""

import sys
from pathlib import Path

import pytest

from tcpexporter.host import port_users
from tcpexporter.host.port_users import User

EXPORTER = "/usr/bin/python3\0/usr/local/bin/tcpexporter\0"
NGINX = "nginx: master process\0"


def word(*numbers: int) -> str:
    """Return four bytes of an address as /proc/net/tcp has them."""
    return f"{int.from_bytes(bytes(numbers), sys.byteorder):08X}"


ANY, LOOPBACK, OTHER = word(0, 0, 0, 0), word(127, 0, 0, 1), word(192, 0, 2, 1)
ANY_IPV6 = ANY * 4
MAPPED = ANY * 2 + word(0, 0, 255, 255) + OTHER
TITLE = "sl local_address rem_address st tx_queue:rx_queue tr:tm retrnsmt uid timeout inode"


class Proc:
    """A copy of /proc."""

    def __init__(self, path: Path) -> None:
        self._path = path
        (path / "net").mkdir()
        (path / "8").mkdir()  # a process that ends meanwhile, or is hidden

    def show(self, *sockets: tuple[str, int, int], state: str = "0A", port: int) -> None:
        """Add sockets to the tables: address, number of the process (0: hidden), inode."""
        for address, process, inode in sockets:
            table = self._path / "net" / ("tcp" if len(address) == 8 else "tcp6")
            if not table.exists():
                table.write_text(f"{TITLE}\n")
            with table.open("a") as lines:
                ends = f"{address}:{port:04X} {address}:0000"
                lines.write(f"0: {ends} {state} 0:0 0:0 0 0 0 {inode} 1\n")
            if process:
                opened = self._path / str(process) / "fd"
                opened.mkdir(parents=True, exist_ok=True)
                (opened / str(inode)).symlink_to(f"socket:[{inode}]")

    def run(self, process: int, command: str) -> None:
        """Set the command line of a process."""
        (self._path / str(process)).mkdir(exist_ok=True)
        (self._path / str(process) / "cmdline").write_text(command)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    monkeypatch.setattr(port_users, "PROC", tmp_path)
    return Proc(tmp_path)


@pytest.mark.parametrize(
    ("command", "user"),
    [
        (EXPORTER, User.EXPORTER),
        ("/usr/local/bin/tcpexporter\0", User.EXPORTER),
        ("/usr/bin/python3\0-I\0-m\0tcpexporter\0--port=443\0", User.EXPORTER),
        ("python3.11\0-Im\0tcpexporter\0", User.EXPORTER),
        ("python3\0-W\0ignore\0/usr/bin/tcpexporter\0", User.EXPORTER),
        (NGINX, User.OTHER),
        ("vi\0-R\0-n\0-u\0tcpexporter\0", User.OTHER),
        ("python3\0/usr/bin/other\0tcpexporter\0", User.OTHER),
        ("python3\0-m\0http.server\0tcpexporter\0", User.OTHER),
        ("python3\0-c\0pass\0", User.OTHER),
        ("python3\0", User.OTHER),
        ("\0", User.OTHER),
    ],
)
def test_an_exporter_is_identified_by_its_socket_and_command(
    command: str, user: User, proc: Proc
) -> None:
    """An argument, or the name of an edited file, does not make a process an exporter."""
    proc.show((ANY, 7, 101), port=9690)
    proc.run(7, command)
    assert port_users.find(9690, ["127.0.0.1"]) == user


def test_other_ports_and_connections_are_ignored(proc: Proc) -> None:
    """The tables are read up to the first connection: the kernel lists listeners first."""
    proc.run(7, EXPORTER)
    proc.show((ANY, 7, 101), port=9690)
    proc.show((ANY, 7, 102), state="01", port=9691)
    proc.show((ANY, 7, 103), port=9692)
    found = [port_users.find(port, ["127.0.0.1"]) for port in (9690, 9691, 9692)]
    assert found == [User.EXPORTER, User.OTHER, User.OTHER]


@pytest.mark.parametrize(
    ("listener", "wanted", "user"),
    [
        (LOOPBACK, ["127.0.0.1"], User.EXPORTER),
        (LOOPBACK, ["192.0.2.1"], User.OTHER),
        (LOOPBACK, ["0.0.0.0", "::"], User.EXPORTER),
        (LOOPBACK, ["::"], User.OTHER),
        (LOOPBACK, ["192.0.2.1", "127.0.0.1"], User.EXPORTER),
        (ANY, ["192.0.2.1"], User.EXPORTER),
        (ANY, ["2001:db8::1"], User.OTHER),
        (ANY_IPV6, ["2001:db8::1"], User.EXPORTER),
        (ANY_IPV6, ["fe80::1%eth0"], User.EXPORTER),
        (ANY_IPV6, ["192.0.2.1"], User.EXPORTER),
        (MAPPED, ["192.0.2.1"], User.EXPORTER),
        (MAPPED, ["127.0.0.1"], User.OTHER),
    ],
)
def test_only_listeners_at_the_same_address_count(
    listener: str, wanted: list[str], user: User, proc: Proc
) -> None:
    """A wildcard is the same as every address of its family; ``::`` may include IPv4."""
    proc.run(7, EXPORTER)
    proc.show((listener, 7, 101), port=9690)
    assert port_users.find(9690, wanted) == user


def test_another_program_at_another_address_is_not_the_exporter(proc: Proc) -> None:
    """An exporter and another program can share a port number, at different addresses."""
    proc.run(7, EXPORTER)
    proc.run(9, NGINX)
    proc.show((LOOPBACK, 7, 101), (OTHER, 9, 102), port=9690)
    assert port_users.find(9690, ["127.0.0.1"]) == User.EXPORTER
    assert port_users.find(9690, ["192.0.2.1"]) == User.OTHER
    assert port_users.find(9690, ["0.0.0.0"]) == User.OTHER  # the other program stays


def test_a_listener_without_a_visible_process_is_hidden(proc: Proc) -> None:
    """Only root can read /proc/PID/fd of another user."""
    proc.run(7, EXPORTER)
    proc.show((LOOPBACK, 0, 101), port=9690)
    assert port_users.find(9690, ["127.0.0.1"]) == User.HIDDEN
    proc.show((OTHER, 7, 102), port=9690)
    assert port_users.find(9690, ["0.0.0.0"]) == User.HIDDEN


def test_a_file_that_is_closed_meanwhile_hides_no_other(proc: Proc, tmp_path: Path) -> None:
    """readlink(2) fails for it. An exporter closes sockets of clients at any time."""
    proc.run(7, EXPORTER)
    for inode in (101, 102):
        proc.show((LOOPBACK, 7, inode), port=9690)
    for number in range(9):
        (tmp_path / "7" / "fd" / f"closed-{number}").touch()  # no link: EINVAL
    assert port_users.find(9690, ["127.0.0.1"]) == User.EXPORTER


@pytest.mark.usefixtures("proc")
def test_unreadable_tables_are_no_error(tmp_path: Path) -> None:
    """A directory in the place of a table makes read(2) fail."""
    (tmp_path / "net" / "tcp").mkdir()
    assert port_users.find(9690, ["127.0.0.1"]) == User.OTHER
