# SPDX-License-Identifier: GPL-3.0-only
"""Binds the addresses at which the exporter accepts HTTP clients."""

import errno
import socket
from typing import Any

from tcpexporter.errors import ServerError

BACKLOG = 1024
"""Maximum number of clients that the kernel queues for accept(2).

The kernel drops the SYNs of further clients, and their TCP sends them again after a second.
"""

RECEIVE_BYTES, SEND_BYTES = 32 * 1024, 128 * 1024
"""Socket buffer sizes of a client. The kernel allocates up to twice as much: socket(7).

Without a limit, each buffer can grow to several MiB. The memory of all TCP sockets together
is limited (tcp_mem), so clients could slow down every service of the host.
"""

# Errors of bind(2) for an address that getaddrinfo(3) returns but this host does not have,
# such as an IPv6 address.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_REMEDIES = {
    errno.EADDRINUSE: "port {port} is already in use:"
    " stop the process that uses it, or choose another port with --listen",
    errno.EACCES: "binding port {port} is not permitted:"
    " start as root, or choose a port from 1024 on with --listen",
    errno.EADDRNOTAVAIL: "{address} is not an address of this host:"
    " choose with --listen one that `ip address` shows",
    errno.EAFNOSUPPORT: "{address} requires IPv6, which this host does not have:"
    " choose an IPv4 address with --listen",
}

_Address = tuple[Any, ...]


def listen(
    address: str | None, port: int, *, only_bind: bool = False
) -> list[socket.socket]:
    """Listen at an address, or at each address of a host name that this host has.

    Args:
        address: an IP address or a host name. None and ``::`` mean every address of the
            host, IPv4 and IPv6, as for exporters written in Go. ``0.0.0.0`` means every
            IPv4 address.
        port: the port; 0 chooses a free port, the same for all addresses.
        only_bind: do not call listen(2). The kernel then refuses clients, and another
            process can listen at the port meanwhile.

    Returns:
        One listening socket per address.

    Raises:
        ServerError: the host has none of the addresses, or the port is not available at
            one of the addresses.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, (host, _, *scope) in _resolve(address, port):
            try:
                sockets.append(_bind(family, (host, port, *scope)))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
            else:
                port = sockets[-1].getsockname()[1]
        if absent and not sockets:
            raise absent
        if not only_bind:
            for sock in sockets:
                sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _server_error(error, address, port) from error
    return sockets


def addresses(address: str | None, port: int) -> list[str]:
    """Return the IP addresses at which `listen` would listen.

    Raises:
        ServerError: the host name cannot be resolved.
    """
    return [sockaddr[0] for _, sockaddr in _resolve(address, port)]


def _resolve(address: str | None, port: int) -> list[tuple[socket.AddressFamily, _Address]]:
    # One socket per address family. On a dual-stack socket the addresses of all IPv4
    # clients would be in one IPv6 network, ::ffff:0:0/96, and share its slots
    # (`fair_share`).
    bound = None if address == "::" else address
    try:
        found = socket.getaddrinfo(
            bound, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ServerError(
            f"cannot resolve {address}: give --listen an address or a name of this host"
        ) from error
    # getaddrinfo(3) returns an address twice if /etc/hosts has two lines for it.
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _bind(family: socket.AddressFamily, sockaddr: _Address) -> socket.socket:
    # asyncio sets TCP_NODELAY only on sockets that were made with IPPROTO_TCP. Without it,
    # the last packet of a response waits 40 ms for the client's delayed ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if family == socket.AF_INET6:
            # IPv4 has its own socket, whatever the value of net.ipv6.bindv6only.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
    except OSError:
        sock.close()
        raise
    return sock


def _server_error(error: OSError, address: str | None, port: int) -> ServerError:
    sentence = _REMEDIES.get(
        error.errno or 0, f"cannot listen at {{address}} on port {{port}}: {error.strerror}"
    )
    return ServerError(sentence.format(address=address or "any address", port=port))
