# SPDX-License-Identifier: GPL-3.0-only
"""Binds the addresses at which the exporter accepts HTTP clients."""

import errno
import logging
import socket
from typing import Any

from tcpexporter.errors import ServerError

BACKLOG = 1024
"""Clients that wait in the kernel to be accepted; others try again after a second."""

RECEIVE_BYTES, SEND_BYTES = 32 * 1024, 128 * 1024
"""What the kernel keeps for a client at most; by socket(7) it takes twice that for it.

By itself it goes up to some MiB for each, and all that the host's connections may take
together is limited: whoever fills that makes every service of the host slow.
"""

# What getaddrinfo(3) names but this host does not have, IPv6 mostly.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_REMEDIES = {
    errno.EADDRINUSE: "port {port} is already in use:"
    " stop what uses it or choose another with --listen",
    errno.EACCES: "port {port} is not permitted:"
    " start as root or choose one of 1024 or above with --listen",
    errno.EADDRNOTAVAIL: "{address} is not an address of this host:"
    " choose with --listen one that `ip address` shows",
    errno.EAFNOSUPPORT: "{address} needs IPv6, which this host does not have:"
    " choose an IPv4 address with --listen",
}

_Address = tuple[Any, ...]

log = logging.getLogger(__name__)


def listen(address: str | None, port: int) -> list[socket.socket]:
    """Listen at an address or a host name; what the host does not have of it is left out.

    Args:
        address: None is every address of the host, IPv4 and IPv6; so is ``::``, as for
            exporters that are written in Go. ``0.0.0.0`` is IPv4 alone.
        port: 0 takes a free one, the same at all addresses.

    Returns:
        One listening socket per address.

    Raises:
        ServerError: the port cannot be had at one of the addresses.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    # A socket for each family, not one for both: its IPv4 clients would all have addresses
    # of one IPv6 network, ::ffff:0:0/96, and share the slots of one (`places`).
    where = None if address == "::" else address
    try:
        for family, (host, _, *scope) in _resolve(where, port):
            try:
                sockets.append(_bind(family, (host, port, *scope)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                absent = error
            else:
                port = sockets[-1].getsockname()[1]
        if absent and not sockets:
            raise absent
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _refusal(error, address, port) from error
    return sockets


def _resolve(address: str | None, port: int) -> list[tuple[socket.AddressFamily, _Address]]:
    try:
        found = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise ServerError(
            f"{address} is not known: give an address or a name of this host with --listen"
        ) from error
    # A name that /etc/hosts has twice is found twice, and cannot be bound twice.
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _bind(family: socket.AddressFamily, sockaddr: _Address) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where it is told that this is TCP. With it,
    # the end of a page waits for the client's delayed ACK: 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if family == socket.AF_INET6:
            # IPv4 has its own socket, whatever net.ipv6.bindv6only says.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    log.info("listening on %s, port %s", *sock.getsockname()[:2])
    return sock


def _refusal(error: OSError, address: str | None, port: int) -> ServerError:
    sentence = _REMEDIES.get(
        error.errno or 0, f"cannot listen at {{address}} on port {{port}}: {error.strerror}"
    )
    return ServerError(sentence.format(address=address or "any address", port=port))
