# SPDX-License-Identifier: GPL-3.0-only
"""Finds network namespaces, their names, and which namespace a name refers to now.

The kernel identifies network namespaces by an inode number, and reuses the lowest free
number: a number identifies a namespace only while a descriptor holds it. The socket tables
hold the namespaces that they read (`socket_tables.tables.SocketTables`).
"""

import contextlib
import fcntl
import functools
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tcpexporter.errors import SettingsError, SourceError

log = logging.getLogger(__name__)

OWN = Path("/proc/self/ns/net")
NAMED = Path("/run/netns")

INIT_PID_NAMESPACE = Path("/proc/1/ns/pid")
HOST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of the host's PID namespace: PROC_PID_INIT_INO in include/linux/proc_ns.h."""

# include/uapi: linux/nsfs.h, linux/sched.h
NS_GET_NSTYPE = 0xB703
CLONE_NEWNET = 0x40000000

CONTAINER_ID = re.compile("[0-9a-f]{64}")
"""Part of the names that Docker, containerd, CRI-O and Podman give to cgroups."""

SHORT_ID = 12
"""How many digits of an id their commands show."""

NOT_FOR_NAMES = ("self", "other")
"""Values of the label ``netns`` that are reserved."""

LIKE_INODE = re.compile("(.*:)?[0-9]{1,10}", re.DOTALL)
"""Names that could also be the label of a namespace without a name."""


def inode(path: Path = OWN) -> int:
    """Return the inode number that identifies a network namespace.

    Raises:
        SourceError: there is no such namespace, or permission is missing.
    """
    try:
        return path.stat().st_ino
    except OSError as error:
        raise _unseen(path, error) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor that holds a namespace until the end of the block.

    Raises:
        SourceError: there is no such namespace, or permission is missing.
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
    """Return the path of a namespace that a user gives as ``self``, a name, or a path.

    Raises:
        SettingsError: the path does not exist, or is not a network namespace.
        SourceError: permission is missing.
    """
    path = _path_of(name)
    try:
        is_namespace = path.stat().st_dev == OWN.stat().st_dev
        with opened(path) if is_namespace else contextlib.nullcontext() as descriptor:
            if descriptor is None or fcntl.ioctl(descriptor, NS_GET_NSTYPE) != CLONE_NEWNET:
                raise SettingsError(f"{path} is not a network namespace", setting="netns")
    except OSError as error:
        if path == OWN or isinstance(error, PermissionError):
            raise _unseen(path, error) from error
        raise SettingsError(
            f"there is no network namespace {path} ({error.strerror}): `ip netns` lists the"
            " names, `lsns -t net` the paths",
            setting="netns",
        ) from error
    return path


def _path_of(name: str) -> Path:
    if name == "self":
        return OWN
    return Path(name) if "/" in name else NAMED / name


def open_watch(name: str, held: Callable[[], Iterable[int]]) -> "Watch | None":
    """Return a watch of the namespace of ``--netns``; None if that is self or all.

    Args:
        name: the value of ``--netns``.
        held: returns the inodes of the namespaces that are held, the counted one first.

    Raises:
        SourceError: the name refers to another namespace already, or to none.
    """
    if name in ("self", "all"):
        return None
    return Watch(name, int(next(iter(held()))))


class Watch:
    """Checks whether a name still refers to the namespace that is counted.

    A confined process cannot enter another namespace, and cannot read /proc/PID/ns/net. It
    can read the attributes of files in /proc/PID/net, whose inodes differ between
    namespaces: while a namespace is held, no file of another one gets the same inode.
    """

    def __init__(self, name: str, number: int) -> None:
        """Watch from now on; this may require root.

        Args:
            name: as in `find`.
            number: the inode of the namespace that is counted, and held.

        Raises:
            SourceError: the name refers to another namespace already, or to none.
        """
        self.is_replaced = False
        """Whether the name was found to refer to another namespace."""
        self._path = self._watched = _path_of(name)
        self._process: int | None = None
        self._trouble: str | None = None
        try:
            if self._path.parts[-2:] == ("ns", "net"):
                # The descriptor stays with that process, even if its id is used again.
                self._process = os.open(self._path.parent.with_name("net"), os.O_PATH)
                self._watched = Path("tcp")
            self._expected = self._identity()
        except OSError as error:
            raise _unseen(self._path, error) from error
        if inode(self._path) != number:
            raise SourceError(self._replaced())

    def close(self) -> None:
        """Close the descriptor of the watched process."""
        if self._process is not None:
            os.close(self._process)

    def trouble(self) -> str | None:
        """Return why the name no longer refers to the counted namespace; None: it does.

        It logs a warning when the namespace is missing, and when it is there again.
        """
        trouble = self._find_trouble()
        if trouble and trouble != self._trouble and not self.is_replaced:
            log.warning("cannot collect metrics: %s", trouble)
        if self._trouble and not trouble:
            log.info("metrics can be collected again")
        self._trouble = trouble
        return trouble

    def _find_trouble(self) -> str | None:
        try:
            file_system, number = self._identity()
        except PermissionError as error:
            _warn_once(
                f"cannot check whether {self._path} still is the namespace that is counted:"
                f" {error.strerror}: let user {os.geteuid()} search its directory"
            )
            return None
        except OSError:
            return self._missing()
        if (file_system, number) == self._expected:
            return None
        # A file of another file system is the one on which ip-netns(8) mounts a namespace:
        # the namespace is not mounted any more.
        if file_system != self._expected[0]:
            return self._missing()
        self.is_replaced = True
        return self._replaced()

    def _identity(self) -> tuple[int, int]:
        status = os.stat(self._watched, dir_fd=self._process)
        return status.st_dev, status.st_ino

    def _missing(self) -> str:
        return (
            f"there is no network namespace {self._path} any more: create it again, or"
            " start the exporter with another --netns"
        )

    def _replaced(self) -> str:
        return (
            f"{self._path} is another network namespace now: restart the exporter to count"
            " its connections"
        )


@functools.cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)


def others() -> Iterator[tuple[int, Path]]:
    """Yield the inode and a path of each namespace of a process or name, except our own.

    A namespace appears once for each process and name, as some of them may end before the
    path is opened. At the end a warning is logged if processes are hidden from us.
    """
    sees_all = _sees_processes_of_host()
    own = inode()
    # A longer pattern would silently omit processes for which permission is missing.
    processes = Path("/proc").glob("[0-9]*")
    for path in (*_names(), *(each / "ns/net" for each in processes)):
        try:
            number = path.stat().st_ino
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
        except PermissionError:
            sees_all = False
            continue
        if number != own:
            yield number, path
    if not sees_all:
        log.warning(
            "--netns all may leave out namespaces, because some processes are hidden:"
            " start in the host's PID namespace, as root, or with CAP_SYS_ADMIN,"
            " CAP_SYS_PTRACE and, in the unit, ProtectProc=default"
        )


def _sees_processes_of_host() -> bool:
    """Return whether /proc shows the processes of the host, not only of a container.

    Return False if the first process is hidden: hidepid in proc(5).
    """
    try:
        return INIT_PID_NAMESPACE.stat().st_ino == HOST_PID_NAMESPACE
    except OSError:
        return False


def _names() -> list[Path]:
    """Return the paths of namespaces that ip-netns(8) has named, sorted."""
    try:
        return sorted(NAMED.iterdir())
    except FileNotFoundError:  # ip-netns(8) creates it with the first name
        return []
    except OSError as error:
        _warn_once(
            f"cannot read the names of namespaces in {NAMED}: {error.strerror}: let user"
            f" {os.geteuid()} read and search it"
        )
        return []


def named() -> dict[int, str]:
    """Return the name that ip-netns(8) has given to each inode; the first of several."""
    found: dict[int, str] = {}
    for path in _names():
        try:
            number = path.stat().st_ino
        except OSError:  # it has been deleted
            continue
        # A name is bytes; a label is text.
        found.setdefault(number, os.fsencode(path.name).decode(errors="replace"))
    return found


class Names:
    """The names of the host's namespaces, for the label ``netns``.

    Only root can see which container's processes use a namespace. So the names of
    containers are read at the start. A namespace keeps that name while it is held: later
    another namespace can get its inode. The owners of sockets show which containers other
    namespaces belong to.
    """

    def __init__(
        self,
        held: Callable[[], Iterable[int]],
        owners: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        """Find the containers.

        Args:
            held: returns the inodes of the namespaces that are held, and have been held
                since before this call.
            owners: returns the name of the owner of the sockets of some namespaces.
        """
        self._held = held
        self._owners = owners
        self._own = inode()
        containers = _containers()
        self._containers = {
            number: containers[number] for number in held() if number in containers
        }

    def read(self) -> dict[int, str]:
        """Return the label of each namespace that is held or named, by inode, all distinct.

        A namespace without a name has its inode as the label. Equal names get the inode
        added: a container can have several namespaces, and cgroups can have equal names.
        """
        held = [int(number) for number in self._held()]
        containers = {
            number: self._containers[number]
            for number in held
            if number in self._containers
        }
        others = {**self._owners(), **containers, **named()}
        others.pop(self._own, None)
        times = Counter((*others.values(), *NOT_FOR_NAMES))
        labels = {
            number: name
            if times[name] == 1 and not LIKE_INODE.fullmatch(name)
            else f"{name}:{number}"
            for number, name in others.items()
        }
        return {**{number: str(number) for number in held}, **labels, self._own: "self"}


def _containers() -> dict[int, str]:
    """Return the container of each namespace that only one container uses, by inode."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            container = CONTAINER_ID.search((process / "cgroup").read_text())
            if container:
                found[(process / "ns/net").stat().st_ino].add(container[0])
        except OSError:  # the process has ended, or permission is missing
            continue
    return {
        number: f"container:{next(iter(ids))[:SHORT_ID]}"
        for number, ids in found.items()
        if len(ids) == 1
    }
