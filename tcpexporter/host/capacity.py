# SPDX-License-Identifier: GPL-3.0-only
"""Estimates the maximum number of connections of a host: ``--max-connections auto``."""

from dataclasses import dataclass
from pathlib import Path

LOWEST = 1024
HIGHEST = 16_777_216
CONNECTION_BYTES = 16 * 1024
"""Kernel memory of a connection with traffic, in bytes: socket, file and some buffers."""


@dataclass(frozen=True)
class Limits:
    """The limits of the number of connections of a host."""

    memory_bytes: int
    orphans: int
    """net.ipv4.tcp_max_orphans, which the kernel derives from the memory of the host."""
    open_files: int
    """fs.file-max: each connection except orphans requires an open file."""
    conntrack: int | None
    """net.netfilter.nf_conntrack_max; None: conntrack is not loaded. A connection uses one
    entry, even if both of its ends are on this host."""


def read_limits(proc: Path = Path("/proc")) -> Limits:
    """Return the limits of this host."""
    sysctl = proc / "sys"
    conntrack = sysctl / "net/netfilter/nf_conntrack_max"
    memory_line = (proc / "meminfo").read_text().splitlines()[0]  # MemTotal: 24684096 kB
    return Limits(
        memory_bytes=int(memory_line.split()[1]) * 1024,
        orphans=int((sysctl / "net/ipv4/tcp_max_orphans").read_text()),
        open_files=int((sysctl / "fs/file-max").read_text()),
        conntrack=int(conntrack.read_text()) if conntrack.exists() else None,
    )


def max_connections(limits: Limits) -> int:
    """Estimate the maximum number of connections, from LOWEST to HIGHEST.

    Return the number that fits into memory, or tcp_max_orphans if that is larger. It is at
    most the number that open files and conntrack allow.
    """
    wanted = max(limits.memory_bytes // CONNECTION_BYTES, limits.orphans)
    bounds = [limits.open_files + limits.orphans, HIGHEST]
    if limits.conntrack is not None:
        bounds.append(2 * limits.conntrack)
    return max(min(wanted, *bounds), LOWEST)
