# SPDX-License-Identifier: GPL-3.0-only
"""Checks whether this machine has enough memory and files for a number of sockets."""

from pathlib import Path

SOCKET_BYTES = 4 * 1024
"""Kernel memory of an idle TCP socket, measured: the socket, its file, inode, directory
entry and descriptor."""

CONTENDER_BYTES = 1024
"""Largest memory per socket of any compared method, which makes several Python objects."""

OTHER_BYTES = 1 << 30
OTHER_FILES = 10_000
KIB_BYTES = 1024
GIB_BYTES = 1 << 30


def shortage(sockets: int, proc: Path = Path("/proc")) -> str:
    """Return a sentence if memory or files do not suffice; otherwise an empty string."""
    needed_bytes = sockets * (SOCKET_BYTES + CONTENDER_BYTES) + OTHER_BYTES
    available_bytes = _available_bytes(proc)
    if needed_bytes > available_bytes:
        return (
            f"{sockets:,} sockets require {needed_bytes / GIB_BYTES:.1f} GiB of memory"
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
