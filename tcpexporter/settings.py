# SPDX-License-Identifier: GPL-3.0-only
"""Flags, environment and file to one frozen `Settings`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose."""

    simple: bool = False
    tcpv6: bool = True
    ports: tuple[int, ...] = ()
    """Local ports to watch, ascending; empty: all."""
    listen_address: str | None = None
    """None: every address, IPv4 and IPv6."""
    listen_port: int = 9690
    duration_s: int = 6
    conf: str | None = None
    direction: str = "inbound"
    """inbound, outbound or all."""
    netns: str = "self"
    """self or all."""
    source: str = "auto"
    """auto, ebpf, sock_diag or procfs."""
    interval_s: float = 1.0
    """Between two polls of a polling source."""
    max_connections: int = 262144
    user: str = "nobody"
    log_level: str = "info"
    log_format: str = "text"
    once: bool = False
