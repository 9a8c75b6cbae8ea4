# SPDX-License-Identifier: GPL-3.0-only
"""Whether this machine has room for that many sockets."""

from pathlib import Path

SOCKET_BYTES = 4 * 1024
"""What the kernel takes for an idle TCP socket with its file, inode and directory entry,
and a holder to know its descriptor; measured."""

CONTENDER_BYTES = 1024
"""What the greediest of those that count takes for each: a Python object of every kind."""

OTHER_BYTES = 1 << 30
OTHER_FILES = 10_000
KIB_BYTES = 1024
GIB_BYTES = 1 << 30


def why_not(sockets: int, proc: Path = Path("/proc")) -> str:
    """A sentence when there is no room for them; empty when there is."""
    needed_bytes = sockets * (SOCKET_BYTES + CONTENDER_BYTES) + OTHER_BYTES
    available_bytes = _available_bytes(proc)
    if needed_bytes > available_bytes:
        return (
            f"{sockets:,} sockets take {needed_bytes / GIB_BYTES:.1f} GiB of memory"
            f" and {available_bytes / GIB_BYTES:.1f} GiB are available"
        )
    free_files = _free_files(proc)
    if sockets + OTHER_FILES > free_files:
        return f"fs.file-max leaves {free_files:,} files for {sockets:,} sockets"
    return ""


def _available_bytes(proc: Path) -> int:
    lines = (proc / "meminfo").read_text().splitlines()
    line = next(each for each in lines if each.startswith("MemAvailable:"))
    return int(line.split()[1]) * KIB_BYTES


def _free_files(proc: Path) -> int:
    allocated, _, most = (proc / "sys/fs/file-nr").read_text().split()
    return int(most) - int(allocated)
