# SPDX-License-Identifier: GPL-3.0-only
"""Listeners: addresses, host names, and errors of the kernel."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable

import pytest

from tcpexporter.errors import ServerError
from tcpexporter.web import http1, listen
from tcpexporter.web.listen import listen as listen_at
from tests.unit.web.support import (
    LOOPBACK,
    Start,
    ask,
    dial,
    make_app,
    needs_ipv6,
)


@needs_ipv6
def test_without_an_address_all_addresses_are_served(start: Start) -> None:
    """IPv4 and IPv6 have the same port."""
    port = start(make_app(), None)
    assert [ask(port, "/-/healthy", host=h).status for h in (LOOPBACK, "::1")] == [200, 200]


@needs_ipv6
@pytest.mark.parametrize(("address", "other"), [(LOOPBACK, "::1"), ("::1", LOOPBACK)])
def test_with_an_address_no_other_is_served(start: Start, address: str, other: str) -> None:
    """Other addresses of the host refuse connections."""
    port = start(make_app(), address)
    assert ask(port, "/-/healthy", host=address).status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/-/healthy", host=other)


@needs_ipv6
def test_the_ipv6_wildcard_includes_ipv4(start: Start) -> None:
    """``[::]`` means IPv4 and IPv6, as in exporters written in Go.

    IPv4 clients must have IPv4 addresses: their IPv4-mapped addresses would all be in one
    source network.
    """
    app = make_app()
    seen: list[str] = []

    async def show(request: http1.Request) -> http1.Response:
        seen.append(request.client)
        return http1.text(200, "seen")

    app._pages = {**app._pages, "/show": show}
    port = start(app, "::")
    for host in (LOOPBACK, "::1"):
        assert ask(port, "/show", host=host).status == 200
    assert seen == [LOOPBACK, "::1"]


@needs_ipv6
def test_the_ipv4_wildcard_excludes_ipv6(start: Start) -> None:
    """``0.0.0.0`` means IPv4 only."""
    port = start(make_app(), "0.0.0.0")
    assert ask(port, "/-/healthy").status == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/-/healthy", host="::1")


def test_a_host_name_is_an_address(start: Start) -> None:
    """Names are resolved."""
    assert ask(start(make_app(), "localhost"), "/-/healthy").status == 200


def test_an_address_found_twice_is_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may resolve to the same address twice."""
    found = socket.getaddrinfo(LOOPBACK, 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found * 2)
    (sock,) = listen_at("localhost", 0)
    sock.close()


def test_a_port_can_be_bound_again_at_once() -> None:
    """A connection of the port may be in TIME_WAIT."""
    (listener,) = listen_at(LOOPBACK, 0)
    port = listener.getsockname()[1]
    with dial(port) as client:
        listener.accept()[0].close()
        assert client.recv(1) == b""
    listener.close()
    (listener,) = listen_at(LOOPBACK, port)
    listener.close()


def test_a_port_in_use_is_refused() -> None:
    """The error names the port and the remedy."""
    with contextlib.ExitStack() as opened:
        for sock in listen_at(LOOPBACK, 0):
            opened.enter_context(sock)
        port = sock.getsockname()[1]
        with pytest.raises(ServerError) as refused:
            listen_at(None, port)
    assert str(refused.value) == (
        f"port {port} is already in use: stop the process that uses it,"
        " or choose another port with --listen"
    )


def test_a_port_can_be_bound_without_disturbing_a_start() -> None:
    """Clients are refused, and an exporter can listen there meanwhile; a port in use is
    still refused."""
    (bound,) = listen_at(LOOPBACK, 0, only_bind=True)
    port = bound.getsockname()[1]
    with bound:
        with pytest.raises(ConnectionRefusedError):
            dial(port)
        (listener,) = listen_at(LOOPBACK, port)
    with listener, pytest.raises(ServerError, match="is already in use"):
        listen_at(LOOPBACK, port, only_bind=True)


@needs_ipv6
def test_the_ipv6_wildcard_has_two_addresses() -> None:
    """They are those that are bound."""
    for wildcard in (None, "::"):
        assert sorted(listen.addresses(wildcard, 9690)) == ["0.0.0.0", "::"]
    assert listen.addresses(LOOPBACK, 9690) == [LOOPBACK]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "binding port 80 is not permitted: start as root, or"),
        (errno.EADDRNOTAVAIL, "127.0.0.1 is not an address of this host: choose"),
        (errno.ENOBUFS, "cannot listen at 127.0.0.1 on port 80: No buffer space available"),
    ],
)
def test_each_error_of_bind_has_a_sentence(
    monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    """No socket stays open."""

    def bind(_sock: socket.socket, _address: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(ServerError, match=f"^{re.escape(sentence)}"):
        listen_at(LOOPBACK, 80)


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "unknown"), UnicodeError("too long")]
)
def test_an_unknown_host_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The error contains the name."""

    def getaddrinfo(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(
        ServerError, match=r"^cannot resolve nowhere: give --listen an address"
    ):
        listen_at("nowhere", 0)


@pytest.fixture
def ipv6_error(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that makes bind(2) of IPv6 sockets fail with an errno."""
    bind = socket.socket.bind

    def refuse(number: int) -> None:
        def bind_ipv4(sock: socket.socket, address: tuple[str, int]) -> None:
            if sock.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            bind(sock, address)

        monkeypatch.setattr(socket.socket, "bind", bind_ipv4)

    return refuse


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
@pytest.mark.parametrize("address", [None, "::"])
def test_a_host_without_ipv6_listens_for_ipv4(
    ipv6_error: Callable[[int], None], number: int, address: str | None
) -> None:
    """An IPv6 address is an error on such a host."""
    ipv6_error(number)
    (sock,) = listen_at(address, 0)
    sock.close()
    assert sock.family == socket.AF_INET
    with pytest.raises(ServerError, match=r"^::1 "):
        listen_at("::1", 0)


@needs_ipv6
def test_a_port_in_use_for_ipv6_alone_is_refused(ipv6_error: Callable[[int], None]) -> None:
    """No socket stays open."""
    ipv6_error(errno.EADDRINUSE)
    with pytest.raises(ServerError, match=r"^port \d+ is already in use"):
        listen_at(None, 0)


def test_kernel_buffers_of_a_client_are_limited() -> None:
    """Accepted sockets have the buffer sizes of the listener, in both directions."""
    (listener,) = listen_at(LOOPBACK, 0)
    with listener, dial(listener.getsockname()[1]):
        accepted, _ = listener.accept()
        with accepted:
            for option, size in (
                (socket.SO_RCVBUF, listen.RECEIVE_BYTES),
                (socket.SO_SNDBUF, listen.SEND_BYTES),
            ):
                assert accepted.getsockopt(socket.SOL_SOCKET, option) == 2 * size


def test_no_response_waits_for_a_delayed_ack() -> None:
    """asyncio sets TCP_NODELAY on connections of a listener made with IPPROTO_TCP."""
    sockets = listen_at(None, 0)
    for each in sockets:
        assert each.proto == socket.IPPROTO_TCP
        each.close()
