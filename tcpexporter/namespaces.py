# SPDX-License-Identifier: GPL-3.0-only
"""Network namespaces: which there are, and what a person calls them."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from tcpexporter.errors import SourceError

log = logging.getLogger(__name__)

OWN = Path("/proc/self/ns/net")
NAMED = Path("/run/netns")

INIT = Path("/proc/1")

CONTAINER_ID = re.compile("[0-9a-f]{64}")
"""What Docker, containerd, CRI-O and Podman name a container's cgroup by."""

SHORT_ID = 12
"""How much of it those show."""


def inode(path: Path = OWN) -> int:
    """The number by which the kernel tells network namespaces apart.

    Raises:
        SourceError: there is no such namespace, or it may not be seen.
    """
    try:
        return path.stat().st_ino
    except OSError as error:
        raise SourceError(
            f"cannot see network namespace {path}: {error.strerror}"
        ) from error


def find(name: str) -> Path:
    """Where a namespace is that a user calls ``self``, by its name, or by a path."""
    if name == "self":
        return OWN
    return Path(name) if "/" in name else NAMED / name


def others() -> dict[int, Path]:
    """All that a process or a name holds but our own, by inode.

    Warns if there may be more, of processes that may not be seen.
    """
    found: dict[int, Path] = {}
    sees_all = INIT.exists()  # or it is hidden: hidepid in proc(5)
    # Not by a longer pattern, which passes over what may not be seen.
    processes = Path("/proc").glob("[0-9]*")
    for path in (*NAMED.glob("*"), *(each / "ns/net" for each in processes)):
        try:
            found.setdefault(path.stat().st_ino, path)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        except PermissionError:
            sees_all = False
    if not sees_all:
        log.warning(
            "--netns all may leave out namespaces, as there are processes that may not be"
            " seen: start as root, or with CAP_SYS_ADMIN, CAP_SYS_PTRACE and, in the unit,"
            " ProtectProc=default"
        )
    found.pop(inode(), None)
    return found


def named() -> dict[int, str]:
    """The names that ip-netns(8) gave, by inode."""
    found = {}
    for path in NAMED.glob("*"):
        try:
            found[path.stat().st_ino] = path.name
        except OSError:  # deleted meanwhile
            continue
    return found


class Names:
    """What the namespaces of the host are called, for the label ``netns``.

    Who is in a namespace can only be seen as root: containers that are started
    later have the inode alone.
    """

    def __init__(self) -> None:
        self._own = inode()
        self._containers = dict(_containers())

    def read(self) -> dict[int, str]:
        """The names there are now, by inode; one that is not there has none."""
        return {**self._containers, **named(), self._own: "self"}


def _containers() -> Iterator[tuple[int, str]]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            container = CONTAINER_ID.search((process / "cgroup").read_text())
            if container:
                yield (
                    (process / "ns/net").stat().st_ino,
                    f"container:{container[0][:SHORT_ID]}",
                )
        except OSError:  # it has ended meanwhile, or is not ours to see
            continue
