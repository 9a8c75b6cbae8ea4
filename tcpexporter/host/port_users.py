# SPDX-License-Identifier: GPL-3.0-only
"""Finds out whether an exporter listens at a port of this host."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")

LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp: include/net/tcp_states.h."""

WORDS = 4
"""The words of a command line that can name the program: ``python -I -m tcpexporter``."""


def has_exporter(port: int) -> bool:
    """Return whether an exporter listens at a TCP port, at any address.

    Only root sees the sockets of other users' processes.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    return any(
        "tcpexporter" in (Path(word).name for word in _command(process)[:WORDS])
        for process in PROC.glob("[0-9]*")
        if not sockets.isdisjoint(_opened(process))
    )


def _listening(port: int) -> Iterator[str]:
    """Yield the inodes of the listening sockets of a port: proc(5)."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # the host has no IPv6
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _opened(process: Path) -> list[str]:
    """Return the files that a process has open; none if it has ended or is hidden."""
    try:
        return [str(each.readlink()) for each in (process / "fd").iterdir()]
    except OSError:
        return []


def _command(process: Path) -> list[str]:
    try:
        return os.fsdecode((process / "cmdline").read_bytes()).split("\0")
    except OSError:
        return []
