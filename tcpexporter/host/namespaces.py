# SPDX-License-Identifier: GPL-3.0-only
"""Network namespaces: which there are, what they are called, and what a name means now.

The kernel tells network namespaces apart by an inode number, and gives the lowest free
number to the next one: a number identifies a namespace only while it is held open. The
socket tables hold those that they read (`socket_tables.tables.SocketTables`).
"""

import contextlib
import fcntl
import functools
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tcpexporter.errors import SettingsError, SourceError, quoted

log = logging.getLogger(__name__)

OWN = Path("/proc/self/ns/net")
NAMED = Path("/run/netns")

INIT_PID_NAMESPACE = Path("/proc/1/ns/pid")
HOST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of the host's: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h."""

# include/uapi: linux/nsfs.h, linux/sched.h
NS_GET_NSTYPE = 0xB703
CLONE_NEWNET = 0x40000000

CONTAINER_ID = re.compile("[0-9a-f]{64}")
"""What Docker, containerd, CRI-O and Podman name a container's cgroup by."""

SHORT_ID = 12
"""How much of it those show."""

NOT_FOR_NAMES = ("self", "other")
"""Values of the label ``netns`` that have another meaning."""

LIKE_INODE = re.compile("(.*:)?[0-9]{1,10}", re.DOTALL)
"""Names that the label could have for another namespace."""


def inode(path: Path = OWN) -> int:
    """The number by which the kernel tells network namespaces apart.

    Raises:
        SourceError: there is no such namespace, or it may not be seen.
    """
    try:
        return path.stat().st_ino
    except OSError as error:
        raise _unseen(path, error) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor that holds a namespace, for the block.

    Raises:
        SourceError: there is no such namespace, or it may not be seen.
    """
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _unseen(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unseen(path: Path, error: OSError) -> SourceError:
    return SourceError(f"cannot see network namespace {path}: {error.strerror}")


def find(name: str) -> Path:
    """Where a namespace is that a user calls ``self``, by its name, or by a path.

    Raises:
        SettingsError: no network namespace is there.
        SourceError: it may not be seen.
    """
    path = _place(name)
    try:
        is_namespace = path.stat().st_dev == OWN.stat().st_dev
        with opened(path) if is_namespace else contextlib.nullcontext() as descriptor:
            if descriptor is None or fcntl.ioctl(descriptor, NS_GET_NSTYPE) != CLONE_NEWNET:
                raise SettingsError(
                    f"--netns {quoted(name)}: {path} is not a network namespace"
                )
    except OSError as error:
        if path == OWN or isinstance(error, PermissionError):
            raise _unseen(path, error) from error
        raise SettingsError(
            f"--netns {quoted(name)}: there is no network namespace {path}"
            f" ({error.strerror}): `ip netns` lists the names, `lsns -t net` the paths"
        ) from error
    return path


def _place(name: str) -> Path:
    if name == "self":
        return OWN
    return Path(name) if "/" in name else NAMED / name


class Watch:
    """Whether what ``--netns`` names still is the namespace that is counted.

    A confined process cannot enter another one, nor see which one /proc/PID/ns/net is.
    It sees /proc/PID/net, where a file has another inode in each namespace: no other file
    gets that of a namespace that is held.
    """

    def __init__(self, name: str, number: int) -> None:
        """Watch from now on; may take root.

        Args:
            name: as `find` takes it.
            number: the inode of the namespace that is counted, and held.

        Raises:
            SourceError: the name means another namespace already, or none.
        """
        self.is_replaced = False
        """Whether the name has been found to mean another namespace."""
        self._path = self._watched = _place(name)
        self._process: int | None = None
        self._trouble: str | None = None
        try:
            if self._path.parts[-2:] == ("ns", "net"):
                # Of that process for ever, though another may get its number.
                self._process = os.open(self._path.parent.with_name("net"), os.O_PATH)
                self._watched = Path("tcp")
            self._expected = self._look()
        except OSError as error:
            raise _unseen(self._path, error) from error
        if inode(self._path) != number:
            raise SourceError(self._replaced())

    def close(self) -> None:
        """Close what it has opened."""
        if self._process is not None:
            os.close(self._process)

    def trouble(self) -> str | None:
        """Why what is counted is not what the name means now; None: it is.

        Warns when the name comes to mean none.
        """
        trouble = self._judge()
        if trouble and trouble != self._trouble and not self.is_replaced:
            log.warning("no metrics can be had: %s", trouble)
        if self._trouble and not trouble:
            log.info("metrics can be had again")
        self._trouble = trouble
        return trouble

    def _judge(self) -> str | None:
        try:
            file_system, number = self._look()
        except PermissionError as error:
            _warn_once(
                f"connections are counted, but {self._path} cannot be watched for another"
                f" namespace of that name: {error.strerror}: let user {os.geteuid()} search"
                " its directory"
            )
            return None
        except OSError:
            return self._gone()
        if (file_system, number) == self._expected:
            return None
        if file_system != self._expected[0]:  # a file that ip-netns(8) mounts it on
            return self._gone()
        self.is_replaced = True
        return self._replaced()

    def _look(self) -> tuple[int, int]:
        status = os.stat(self._watched, dir_fd=self._process)
        return status.st_dev, status.st_ino

    def _gone(self) -> str:
        return (
            f"there is no network namespace {self._path} any more: make it again, or start"
            " the exporter with another --netns"
        )

    def _replaced(self) -> str:
        return (
            f"{self._path} is another network namespace now: start the exporter again to"
            " count its connections"
        )


@functools.cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)


def others() -> Iterator[tuple[int, Path]]:
    """All that a process or a name has but our own: inode, and where to open it.

    A namespace comes once for each process or name: some may have ended when it is opened.
    Warns in the end if there may be more, of processes that may not be seen.
    """
    sees_all = _sees_processes_of_host()
    own = inode()
    # Not by a longer pattern, which passes over what may not be seen.
    processes = Path("/proc").glob("[0-9]*")
    for path in (*_names(), *(each / "ns/net" for each in processes)):
        try:
            number = path.stat().st_ino
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        except PermissionError:
            sees_all = False
            continue
        if number != own:
            yield number, path
    if not sees_all:
        log.warning(
            "--netns all may leave out namespaces, as there are processes that may not be"
            " seen: start in the host's PID namespace, as root, or with CAP_SYS_ADMIN,"
            " CAP_SYS_PTRACE and, in the unit, ProtectProc=default"
        )


def _sees_processes_of_host() -> bool:
    """Whether /proc has those of the host, and not of a container alone.

    Its first process may be hidden: hidepid in proc(5).
    """
    try:
        return INIT_PID_NAMESPACE.stat().st_ino == HOST_PID_NAMESPACE
    except OSError:
        return False


def _names() -> list[Path]:
    """What ip-netns(8) has given a name, in the order of the names."""
    try:
        return sorted(NAMED.iterdir())
    except FileNotFoundError:  # it makes that with the first
        return []
    except OSError as error:
        _warn_once(
            f"namespaces have no names, as {NAMED} cannot be read: {error.strerror}:"
            f" let user {os.geteuid()} read and search it"
        )
        return []


def named() -> dict[int, str]:
    """The names that ip-netns(8) gave, by inode; the first of several."""
    found: dict[int, str] = {}
    for path in _names():
        try:
            number = path.stat().st_ino
        except OSError:  # deleted meanwhile
            continue
        # A name is bytes; a label is text.
        found.setdefault(number, os.fsencode(path.name).decode(errors="replace"))
    return found


class Names:
    """What the namespaces of the host are called, for the label ``netns``.

    Who is in a namespace can only be seen as root, so at the start. A container's name is
    that of its namespace for as long as this is held: then another may have its number.
    """

    def __init__(self, held: Callable[[], Iterable[int]]) -> None:
        """Look for containers.

        Args:
            held: the inodes of the namespaces that are held since before, at any time.
        """
        self._held = held
        self._own = inode()
        containers = _containers()
        self._containers = {
            number: containers[number] for number in held() if number in containers
        }

    def read(self) -> dict[int, str]:
        """The names there are now, by inode, and the inode of what is held without one.

        What is neither held nor named has none: it may have ended. No two are the same: a
        container can have several namespaces, and its cgroup can be named like another's.
        """
        held = [int(number) for number in self._held()]
        containers = {
            number: self._containers[number]
            for number in held
            if number in self._containers
        }
        others = {**containers, **named()}
        others.pop(self._own, None)
        times = Counter((*others.values(), *NOT_FOR_NAMES))
        told = {
            number: name
            if times[name] == 1 and not LIKE_INODE.fullmatch(name)
            else f"{name}:{number}"
            for number, name in others.items()
        }
        return {**{number: str(number) for number in held}, **told, self._own: "self"}


def _containers() -> dict[int, str]:
    """The container that has a namespace to itself, by inode."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            container = CONTAINER_ID.search((process / "cgroup").read_text())
            if container:
                found[(process / "ns/net").stat().st_ino].add(container[0])
        except OSError:  # it has ended meanwhile, or is not ours to see
            continue
    return {
        number: f"container:{next(iter(ids))[:SHORT_ID]}"
        for number, ids in found.items()
        if len(ids) == 1
    }
