# SPDX-License-Identifier: GPL-3.0-only
"""--check: the port and the file of --state. The end-to-end tests have the other lines."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpexporter import checking
from tcpexporter.config.settings import Settings
from tcpexporter.errors import ServerError
from tcpexporter.host import port_users
from tcpexporter.host.port_users import User
from tcpexporter.socket_tables.saved_ages import State


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.parametrize(
    ("user", "line"),
    [
        (
            User.EXPORTER,
            (
                "port {} is in use by an exporter, which must end before another can start"
                " there\n"
            ),
        ),
        (User.HIDDEN, "port {} is in use; only root can see by which process\n"),
    ],
)
def test_an_exporter_or_a_hidden_process_at_the_port_is_no_error(
    listener: socket.socket, user: User, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service can run under another user, whose sockets only root sees."""
    port = listener.getsockname()[1]
    settings = Settings(listen_address="127.0.0.1", listen_port=port)
    monkeypatch.setattr(port_users, "find", lambda *_: user)
    assert checking._bind(settings) == line.format(port)


def test_another_program_at_the_port_is_an_error(listener: socket.socket) -> None:
    """This process is not an exporter."""
    port = listener.getsockname()[1]
    settings = Settings(listen_address="127.0.0.1", listen_port=port)
    with pytest.raises(ServerError, match="is already in use: stop the process"):
        checking._bind(settings)


def test_the_port_is_free_after_the_check(listener: socket.socket) -> None:
    """Nothing is printed about a free port, and listen(2) is not called."""
    port = listener.getsockname()[1]
    listener.close()
    assert checking._bind(Settings(listen_address="127.0.0.1", listen_port=port)) == ""
    with contextlib.closing(socket.create_server(("127.0.0.1", port))):
        pass


@pytest.mark.parametrize(
    ("source", "is_usable", "lines"),
    [
        ("ebpf", True, ["restore ages from {}, and save them"]),
        ("sock_diag", True, ["restore ages from {}, and save them"]),
        ("sock_diag", False, []),
        ("procfs", True, []),
    ],
)
def test_ages_are_only_announced_if_they_can_be_restored(
    source: str,
    is_usable: bool,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not after a warning about the file; and procfs has no socket cookies."""
    state = tmp_path / "state"
    monkeypatch.setattr(State, "check", lambda _: is_usable)
    settings = Settings(state=str(state))
    assert list(checking._kept(settings, source)) == [each.format(state) for each in lines]
