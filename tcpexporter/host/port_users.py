# SPDX-License-Identifier: GPL-3.0-only
"""Finds out whether an exporter listens at a port of this host."""

import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from itertools import islice
from pathlib import Path

PROC = Path("/proc")

LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp: include/net/tcp_states.h."""

NAME = "tcpexporter"
"""The name of the command, and of the module after ``python -m``."""

WITH_ARGUMENT = ("-W", "-X", "--check-hash-based-pycs")
"""Options of the Python interpreter whose argument can be the next word."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class User(Enum):
    """Which program listens at a port."""

    EXPORTER = auto()
    HIDDEN = auto()
    """A process that this user cannot see: only root sees the sockets of other users."""
    OTHER = auto()
    """Another program; or no listening socket has the port."""


def find(port: int, addresses: Iterable[str]) -> User:
    """Return which program prevents another one from listening at these addresses.

    Args:
        port: the TCP port.
        addresses: IP addresses. A listener at another address is ignored.

    Returns:
        EXPORTER if every such listener is an exporter. OTHER if one is another program.
        HIDDEN otherwise.
    """
    wanted = [_plain(ipaddress.ip_address(each.partition("%")[0])) for each in addresses]
    sockets = {
        f"socket:[{inode}]"
        for local, inode in _listening(port)
        if any(_conflict(local, each) for each in wanted)
    }
    if not sockets:
        return User.OTHER
    seen: set[str] = set()
    exporters: set[str] = set()
    for process in PROC.glob("[0-9]*"):
        if opened := sockets.intersection(_opened(process)):
            seen |= opened
            if _is_exporter(_command(process)):
                exporters |= opened
    if seen - exporters:
        return User.OTHER
    return User.EXPORTER if exporters == sockets else User.HIDDEN


def _conflict(local: _Address, wanted: _Address) -> bool:
    """Return whether bind(2) can fail because of a listener at another address.

    An IPv6 wildcard can include IPv4: /proc does not show IPV6_V6ONLY.
    """
    if local == wanted or (local.version == 6 and local.is_unspecified):
        return True
    is_wildcard = local.is_unspecified or wanted.is_unspecified
    return is_wildcard and local.version == wanted.version


def _listening(port: int) -> Iterator[tuple[_Address, str]]:
    """Yield the address and the inode of each listening socket of a port: proc(5)."""
    for name in ("tcp", "tcp6"):
        # If the host has no IPv6, there is no tcp6.
        with contextlib.suppress(OSError), (PROC / "net" / name).open() as lines:
            for line in islice(lines, 1, None):
                fields = line.split()
                # The kernel lists all listeners first. A million connections can follow.
                if fields[3] != LISTEN:
                    break
                address, _, number = fields[1].partition(":")
                if int(number, 16) == port:
                    yield _address(address), fields[9]


def _address(words: str) -> _Address:
    """Return an address of /proc/net/tcp: 32-bit words in the byte order of the host."""
    starts = range(0, len(words), 8)
    parts = (int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in starts)
    return _plain(ipaddress.ip_address(b"".join(parts)))


def _plain(address: _Address) -> _Address:
    """Return the IPv4 address of an IPv4-mapped IPv6 address, and others unchanged."""
    return getattr(address, "ipv4_mapped", None) or address


def _opened(process: Path) -> Iterator[str]:
    """Yield the files that a process has open; none if it has ended or is hidden."""
    with contextlib.suppress(OSError):
        for each in (process / "fd").iterdir():
            # The process can close files meanwhile, such as the socket of a client.
            with contextlib.suppress(OSError):
                yield str(each.readlink())


def _command(process: Path) -> list[str]:
    try:
        return os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _is_exporter(command: list[str]) -> bool:
    """Return whether a command line runs the exporter, by itself or with Python."""
    name, *rest = command or [""]
    if Path(name).name == NAME:
        return True
    if not re.fullmatch(r"python[\d.]*", Path(name).name):
        return False
    words = iter(rest)
    for word in words:
        if re.fullmatch(r"-[A-Za-z]*m", word):
            return next(words, "") == NAME
        if not word.startswith("-"):
            return Path(word).name == NAME
        if word in WITH_ARGUMENT:
            next(words, "")
    return False
