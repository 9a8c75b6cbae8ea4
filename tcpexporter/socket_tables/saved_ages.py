# SPDX-License-Identifier: GPL-3.0-only
"""Saves the ages of connections to a file, for hosts where nothing can be pinned.

For each connection the file has the time when it was established, its direction, the cookie
of its socket, and a hash of its key. The kernel gives that cookie to no other socket until
the host boots again. The file has no addresses. The next run reads the socket tables. If a
connection is in the tables and in the file, it gets the saved time and direction. These are
the cases for a connection:

a. It stays open: it gets its saved time.
b. It closes, and a new socket opens the same address pair while no exporter runs: the new
   socket has another cookie. The connection gets the age from the socket tables.
c. As b, but the same socket opens the address pair again. A client can do that after
   connect(2) with AF_UNSPEC. The socket tables do not show the difference, so the second
   connection gets the time of the first. If an address or a port differs, the key differs
   too, and the second connection gets the age from the socket tables.
d. It opens after the last save: it gets the age from the socket tables.

The process that saves is confined: it cannot open, rename or remove a file. It can only
write to a file that is already open. So the file has two areas, and saves alternate between
them. Each area has a checksum of its whole content, and a number that is higher in the
newer area. At any time at least one area is complete:

e. The exporter is killed while it writes an area: the checksum of that area is wrong, and
   the other area has the previous save.
f. The disk is full, or fails: as e, and the next save uses the same area again.
g. The power fails: after that, the file is from another boot, and is ignored. So the
   exporter does not wait until the disk has stored a save (fsync): until the next boot, the
   kernel returns the written content.
h. A second exporter starts: it ends with an error, as the first one has locked the file.
i. The file is deleted or replaced while the exporter runs: the next run could not find the
   saves. The exporter logs that, and does not save again.
"""

import contextlib
import errno
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import hashes
from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import Records
from tcpexporter.connections.source import ConnectionTables
from tcpexporter.errors import SourceError, StateError, enough_memory
from tcpexporter.host import owned
from tcpexporter.host.background import Task

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Seconds between two saves."""

LIMIT_S = 300.0
"""Seconds after which a save counts as hanging."""

STOP_TIMEOUT_S = 5.0
"""Seconds for the last save. If it takes longer, the next run finds the previous save."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""A file with a random identifier of this boot: random(4)."""

MAGIC = b"tcpexage"
VERSION = 1

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("checksum", "<u4"),
        ("number", "<u8"),
        ("boot", "u1", 16),
        ("secret", "<u8", 2),
        ("count", "<u8"),
    ]
)
"""The header of a save.

``checksum`` is the CRC-32 of the rows followed by the header, with ``checksum`` 0.
``number`` is higher in a newer save. ``boot`` identifies the boot. ``secret`` is the secret
of the hashes. ``count`` is the number of rows, which follow.
"""

ROW = np.dtype(
    [("cookie", "<u8"), ("hash", "<u8"), ("established_ns", "<u8"), ("direction", "u1")]
)
"""A saved connection; ``established_ns`` is on the CLOCK_BOOTTIME of its boot."""

AREAS = 2
PIECE_BYTES = 1 << 16
"""Size in bytes of the pieces in which the areas alternate, so that both can grow."""

DISK_ERRORS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a disk. They do not prevent the start of the exporter."""


@dataclass(frozen=True)
class Save:
    """A save: the content of an area, with the fields of `HEADER`."""

    number: int
    boot: bytes
    secret: tuple[int, int]
    rows: Records
    """The saved connections, of dtype `ROW`."""


def parse(area: bytes) -> Save:
    """Parse an area. Bytes after the save belong to an older, longer save, and are ignored.

    Raises:
        StateError: the save is incomplete, damaged, or has another version.
    """
    if len(area) < HEADER.itemsize:
        raise StateError("it ends within the header")
    header = np.frombuffer(area, HEADER, 1)
    if header["magic"][0] != MAGIC:
        raise StateError("it does not begin with the magic number of a save")
    if header["version"][0] != VERSION:
        raise StateError(f"it has version {header['version'][0]}, not {VERSION}")
    count = int(header["count"][0])
    if count > (len(area) - HEADER.itemsize) // ROW.itemsize:
        raise StateError(f"it ends before the last of {count} connections")
    rows = np.frombuffer(area, ROW, count, HEADER.itemsize)
    if header["checksum"][0] != _checksum(header, zlib.crc32(rows.view(np.uint8).data)):
        raise StateError("its checksum is wrong")
    if (rows["direction"] > max(Direction)).any():
        raise StateError("it has a connection with an unknown direction")
    first, second = header["secret"][0].tolist()
    return Save(int(header["number"][0]), header["boot"].tobytes(), (first, second), rows)


def compose(save: Save) -> bytes:
    """Return a save as bytes, as `parse` accepts them."""
    header = np.zeros(1, HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    header["number"], header["boot"] = save.number, np.frombuffer(save.boot, np.uint8)
    header["secret"], header["count"] = save.secret, len(save.rows)
    rows = save.rows.view(np.uint8).data
    header["checksum"] = _checksum(header, zlib.crc32(rows))
    return b"".join((header.tobytes(), rows))


def _checksum(header: Records, rows_checksum: int) -> int:
    """Return the checksum that a header must have, from the checksum of its rows."""
    without = header.copy()
    without["checksum"] = 0
    return zlib.crc32(without.tobytes(), rows_checksum)


class State:
    """The file of --state, which one exporter at a time has locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use the descriptor of a file that `open` has opened and locked."""
        self.saved_s: float | None = None
        """When ages were last saved, in Unix time; 0: not yet; None: ages are not saved."""
        self._path = path
        self._descriptor = descriptor
        self._boot = bytes.fromhex(BOOT_ID.read_text().replace("-", ""))
        # Not the secret of the BPF program: a user who can read the file could open
        # connections whose hashes collide in the BPF program.
        self._secret = int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8))
        self._area = 0
        self._number = 0
        self._written: int | None = None
        """The checksum of the rows of the last save; None: nothing was saved yet."""
        self._task: Task | None = None

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Open the file and lock it until `close`; create the file if it does not exist.

        Returns:
            The open file; None if the disk fails. Then a warning is logged, and ages are
            not saved.

        Raises:
            StateError: the file belongs to another user or program, or another exporter
                has locked it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with _disk_errors(path), contextlib.ExitStack() as undo:
            descriptor = os.open(path, flags, 0o600)
            undo.callback(os.close, descriptor)
            _require_own_state(path, descriptor)
            owned.lock(path, descriptor, StateError, setting="--state")
            opened = cls(path, descriptor)
            undo.pop_all()
            return opened
        return None  # after a warning

    @staticmethod
    def check(path: Path) -> bool:
        """Check what `open` requires, but change, create and lock nothing.

        Returns:
            Whether `open` would return an open file; if not, a warning is logged.

        Raises:
            StateError: the file cannot be used.
        """
        with _disk_errors(path), contextlib.ExitStack() as undo:
            if os.path.lexists(path):
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                undo.callback(os.close, descriptor)
                _require_own_state(path, descriptor)
            else:
                _require_creatable(path)
            return True
        return False  # after a warning

    def close(self) -> None:
        """Save a last time, if `begin` was called, and unlock the file."""
        if self._task is None or self._task.stop(STOP_TIMEOUT_S):
            os.close(self._descriptor)

    def tasks(self) -> list[Task]:
        """Return the task whose thread saves, if `begin` was called."""
        return [self._task] if self._task else []

    # Restoring

    def aged(self, tables: ConnectionTables) -> ConnectionTables:
        """Return the socket tables with the saved times and directions of connections."""
        save = self._newest()
        return _RestoredTables(tables, save) if save and save.boot == self._boot else tables

    def _newest(self) -> Save | None:
        """Return the newest save, and select the area for the next save."""
        saves: dict[int, Save] = {}
        reasons = []
        for area in range(AREAS):
            try:
                if content := self._read(area):
                    saves[area] = parse(content)
            except (StateError, OSError) as error:
                reasons.append(str(error))
        if not saves:
            if reasons:
                log.warning("cannot restore ages from %s: %s", self._path, reasons[0])
            return None
        newest = max(saves, key=lambda area: saves[area].number)
        self._area = (newest + 1) % AREAS
        self._number = saves[newest].number
        return saves[newest]

    def _read(self, area: int) -> bytes:
        """Return the content of an area."""
        size = os.fstat(self._descriptor).st_size
        offsets = range(area * PIECE_BYTES, size, AREAS * PIECE_BYTES)
        return b"".join(os.pread(self._descriptor, PIECE_BYTES, at) for at in offsets)

    # Saving

    def begin(self, known: Callable[[], Records]) -> None:
        """Start a thread that saves at intervals.

        Args:
            known: a function that returns the connections to save, of dtype `SOCKET`. It
                raises SourceError if it fails.

        Raises:
            ThreadError: the kernel refuses another thread.
        """
        self.saved_s = 0.0
        self._task = task = Task(
            "state",
            lambda: self._save_repeatedly(task, known),
            without="ages are not saved",
            limit_s=LIMIT_S,
        )
        task.begin()

    def _save_repeatedly(self, task: Task, known: Callable[[], Records]) -> None:
        """Save at intervals, and once more when the task is stopped."""
        failing = False
        has_ended = False
        while not has_ended:
            has_ended = task.wait(INTERVAL_S)
            with task.attempt():
                try:
                    with enough_memory():
                        self._save(known())
                except (SourceError, StateError) as error:
                    # The task must not count as failing: a restart of the exporter would
                    # not help.
                    if not failing:
                        log.warning("ages are not saved: %s", error)
                    failing = True
                else:
                    if failing:
                        log.info("ages are saved again")
                    failing = False

    def _save(self, connections: Records) -> None:
        """Save connections, unless the newest save has the same content.

        Raises:
            StateError: the connections cannot be saved.
        """
        rows = _rows(connections, self._secret)
        checksum = zlib.crc32(rows.view(np.uint8).data)
        try:
            if not os.fstat(self._descriptor).st_nlink:
                raise StateError(
                    f"{self._path} was deleted or replaced: restart the exporter"
                )
            if checksum != self._written:
                number = (self._number + 1) % 2**64
                save = Save(number, self._boot, self._secret, rows)
                self._write(memoryview(compose(save)))
                self._number = number
                self._area = (self._area + 1) % AREAS
        except OSError as error:
            raise StateError(f"{self._path}: {error.strerror}") from error
        self._written = checksum
        self.saved_s = time.time()

    def _write(self, save: memoryview) -> None:
        """Write with lseek(2) and write(2): a confined process may not use pwrite(2)."""
        for first in range(0, len(save), PIECE_BYTES):
            offset = AREAS * first + self._area * PIECE_BYTES
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            left = save[first : first + PIECE_BYTES]
            while left:
                left = left[os.write(self._descriptor, left) :]


class _RestoredTables:
    """Socket tables in which connections have their saved times and directions."""

    def __init__(self, tables: ConnectionTables, save: Save) -> None:
        self._tables = tables
        self._secret = save.secret
        self._rows = save.rows[np.argsort(save.rows["cookie"])]

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def established(self, *, with_ages: bool) -> Records:
        """Read the tables, and restore the saved times and directions of connections.

        Both times are upper bounds, or one is the exact time of an event. So the earlier
        time is used.
        """
        found = self._tables.established(with_ages=with_ages)
        cookies = self._rows["cookie"]
        place = np.searchsorted(cookies, found["cookie"])
        at = np.flatnonzero((found["cookie"] != 0) & (place < len(cookies)))
        saved = self._rows[place[at]]
        is_same = saved["cookie"] == found["cookie"][at]
        is_same &= saved["hash"] == hashes(found["key"][at], self._secret)
        at, saved = at[is_same], saved[is_same]
        found["established_ns"][at] = np.minimum(
            found["established_ns"][at], saved["established_ns"]
        )
        found["is_outbound"][at] = saved["direction"]
        if len(at):
            log.info("restored the ages of %s connections", len(at))
        return found


def _rows(connections: Records, secret: tuple[int, int]) -> Records:
    """Return the rows to save for connections, of dtype `ROW`.

    Raises:
        StateError: there are connections, but none has a cookie.
    """
    identified = connections[connections["cookie"] != 0]
    if len(connections) and not len(identified):
        raise StateError(
            "ages can only be saved with sock_diag: /proc/net/tcp has no socket cookies"
        )
    rows = np.zeros(len(identified), ROW)
    rows["cookie"] = identified["cookie"]
    rows["hash"] = hashes(identified["key"], secret)
    rows["established_ns"] = identified["established_ns"]
    rows["direction"] = identified["is_outbound"]
    return rows


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """End the block with a warning if the disk is at fault, and with StateError if not."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise _unusable(path, error) from error
        log.warning("ages are not saved: %s: %s", path, error.strerror)


def _require_own_state(path: Path, descriptor: int) -> None:
    """Refuse a file that is of another kind, or to which other users have access.

    Its kind comes first: the mode of another program's file must not be changed.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise StateError(f"{path} is not a regular file: choose another path with --state")
    if os.pread(descriptor, len(MAGIC), 0) not in (b"", MAGIC):
        raise StateError(
            f"{path} is not a file of --state: choose another path with --state"
        )
    owned.require_own(path, status, StateError)


def _require_creatable(path: Path) -> None:
    """Raise the OSError that the creation of a file would raise."""
    os.close(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    # access(2) refuses a read-only file system too.
    if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _unusable(path: Path, error: OSError) -> StateError:
    why = error.strerror
    if error.errno == errno.ENOENT:
        why = (
            f"the directory {path.parent} does not exist: create it (install -d -m 0700"
            f" {path.parent}), or choose another path with --state"
        )
    return StateError(f"{path} cannot be used: {why}")
