# SPDX-License-Identifier: GPL-3.0-only
"""Saves the ages of connections in a file, for hosts where nothing can be pinned.

What is saved of a connection is when it was established, its direction, and what it is
told by: the cookie of its socket, which no other socket gets until the host boots again,
and a hash of its key. So the file has nobody's address. The next run looks at the socket
tables as ever; of a connection that they show it takes what was saved for what they tell.
For a connection, against that:

a. Open all the while: it has its time.
b. Closed, and its address pair opened anew while nobody runs: another socket, which has
   another cookie. It has the age that the tables tell.
c. As b, but by the same socket, as a client can that disconnects it (connect(2) with
   AF_UNSPEC): nothing in the tables tells the two apart, and it has the time of the first.
   If it is connected elsewhere, or from another port, it has another key.
d. Opened after the last save: it has the age that the tables tell.

The process that saves is confined: it cannot open, rename or remove a file, only write to
one that it has. So the file has two areas, written by turns, each with a checksum of all of
it and a number that tells which one is newer. At every moment one of them is whole:

e. Killed while an area is written: its checksum is wrong, the other has the save before.
f. The disk is full, or fails: as e, and the next save is tried in the same area.
g. The power fails: whatever is there is of another boot, and is not taken over. So nothing
   waits for the disk: until then the kernel shows what was written.
h. Two exporters: the second is refused, as the first has the file locked.
i. The file is deleted or replaced while we run: it has no name any more, and is of no use
   to the next run. That is said, and no more is saved.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import hashes
from tcpexporter.connections.record import Direction, Records, directions, groups
from tcpexporter.connections.source import ConnectionTables
from tcpexporter.errors import SourceError, StateError, enough_memory
from tcpexporter.host.background import Task

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Between two saves."""

LIMIT_S = 300.0
"""For a save."""

STOP_TIMEOUT_S = 5.0
"""For the last one; if it takes longer, the one before is what the next run finds."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one after each boot: random(4)."""

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
"""What a save begins with.

``checksum`` is the CRC-32 of the rows, and then of the header with 0 in its place;
``number`` is higher in a newer save; ``secret`` is that of the hashes.
"""

ROW = np.dtype(
    [("cookie", "<u8"), ("hash", "<u8"), ("established_ns", "<u8"), ("direction", "u1")]
)
"""What is saved of a connection; ``established_ns`` is on CLOCK_BOOTTIME of that boot."""

AREAS = 2
PIECE_BYTES = 1 << 16
"""Of the areas by turns; so both can grow."""

PASSING = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What may be wrong with a disk, and is not for us to be refused for."""


@dataclass(frozen=True)
class Save:
    """What an area has."""

    number: int
    boot: bytes
    secret: tuple[int, int]
    rows: Records
    """Of dtype `ROW`."""


def parse(area: bytes) -> Save:
    """A save from the bytes that an area has; what follows it is left from a longer one.

    Raises:
        StateError: it is not whole, or of another version.
    """
    if len(area) < HEADER.itemsize:
        raise StateError("it ends within the header")
    header = np.frombuffer(area, HEADER, 1)
    if header["magic"][0] != MAGIC:
        raise StateError("it does not begin as a save does")
    if header["version"][0] != VERSION:
        raise StateError(f"it is of version {header['version'][0]}, not {VERSION}")
    count = int(header["count"][0])
    if count > (len(area) - HEADER.itemsize) // ROW.itemsize:
        raise StateError(f"it ends before the last of {count} connections")
    rows = np.frombuffer(area, ROW, count, HEADER.itemsize)
    if header["checksum"][0] != _checksum(header, zlib.crc32(rows.view(np.uint8).data)):
        raise StateError("its checksum is wrong")
    if (rows["direction"] > max(Direction)).any():
        raise StateError("it has connections of no direction")
    first, second = header["secret"][0].tolist()
    return Save(int(header["number"][0]), header["boot"].tobytes(), (first, second), rows)


def compose(save: Save) -> bytes:
    """What `parse` takes."""
    header = np.zeros(1, HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    header["number"], header["boot"] = save.number, np.frombuffer(save.boot, np.uint8)
    header["secret"], header["count"] = save.secret, len(save.rows)
    rows = save.rows.view(np.uint8).data
    header["checksum"] = _checksum(header, zlib.crc32(rows))
    return b"".join((header.tobytes(), rows))


def _checksum(header: Records, of_rows: int) -> int:
    without = header.copy()
    without["checksum"] = 0
    return zlib.crc32(without.tobytes(), of_rows)


class State:
    """The file, of one exporter at a time."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Take one that is locked by its descriptor: see `open`."""
        self.saved_s: float | None = None
        """When ages were last saved, by the wall clock; 0: not yet, None: they are not."""
        self._path = path
        self._descriptor = descriptor
        self._boot = bytes.fromhex(BOOT_ID.read_text().replace("-", ""))
        # Not that of the BPF program: who reads the file is not to make its keys collide.
        self._secret = int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8))
        self._area = 0
        self._number = 0
        self._written: int | None = None
        self._task: Task | None = None

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Have a file, which is made if need be, until `close`.

        None where the disk has trouble: that is logged, as it does not keep the exporter
        from counting.

        Raises:
            StateError: it is somebody else's, or another exporter has it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with contextlib.ExitStack() as undo:
                descriptor = os.open(path, flags, 0o600)
                undo.callback(os.close, descriptor)
                _require_own(path, os.fstat(descriptor))
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _require_state(path, os.pread(descriptor, len(MAGIC), 0))
                opened = cls(path, descriptor)
                undo.pop_all()
        except BlockingIOError:
            raise StateError(
                f"{path} is another exporter's: stop it, or choose one with --state"
            ) from None
        except OSError as error:
            if error.errno not in PASSING:
                raise StateError(f"{path} cannot be used: {error.strerror}") from error
            log.warning("ages are not saved: %s: %s", path, error.strerror)
            return None
        return opened

    def close(self) -> None:
        """Save a last time, if `begin` was called, and let another exporter have it."""
        if self._task is None or self._task.stop(STOP_TIMEOUT_S):
            os.close(self._descriptor)

    def tasks(self) -> list[Task]:
        """The thread that saves, if `begin` was called."""
        return [self._task] if self._task else []

    # Taking over

    def aged(self, tables: ConnectionTables) -> ConnectionTables:
        """The socket tables, with what was saved of the connections that they tell of."""
        save = self._newest()
        return _Aged(tables, save) if save and save.boot == self._boot else tables

    def _newest(self) -> Save | None:
        """What there is to take over; and decides where the next save goes."""
        saves: dict[int, Save] = {}
        reasons = []
        for area in range(AREAS):
            try:
                if there := self._read(area):
                    saves[area] = parse(there)
            except (StateError, OSError) as error:
                reasons.append(str(error))
        if not saves:
            if reasons:
                log.warning("the ages in %s are lost: %s", self._path, reasons[0])
            return None
        newest = max(saves, key=lambda area: saves[area].number)
        self._area = (newest + 1) % AREAS
        self._number = saves[newest].number
        return saves[newest]

    def _read(self, area: int) -> bytes:
        size = os.fstat(self._descriptor).st_size
        places = range(area * PIECE_BYTES, size, AREAS * PIECE_BYTES)
        return b"".join(os.pread(self._descriptor, PIECE_BYTES, at) for at in places)

    # Saving

    def begin(self, known: Callable[[], Records]) -> None:
        """Save at intervals from now on, in a thread.

        Args:
            known: returns the connections to save, of dtype `SOCKET`; raises SourceError
                if it cannot.

        Raises:
            ThreadError: there can be no thread.
        """
        self.saved_s = 0.0
        self._task = task = Task(
            "state",
            lambda: self._save_on(task, known),
            without="ages are not saved",
            limit_s=LIMIT_S,
        )
        task.begin()

    def _save_on(self, task: Task, known: Callable[[], Records]) -> None:
        failing = False
        has_ended = False
        while not has_ended:
            has_ended = task.wait(INTERVAL_S)
            with task.attempt():
                try:
                    with enough_memory():
                        self._save(known())
                except (SourceError, StateError) as error:
                    # Not the thread's failure: restarting the exporter would mend nothing.
                    if not failing:
                        log.warning("ages are not saved: %s", error)
                    failing = True
                else:
                    if failing:
                        log.info("ages are saved again")
                    failing = False

    def _save(self, connections: Records) -> None:
        rows = _rows(connections, self._secret)
        of_rows = zlib.crc32(rows.view(np.uint8).data)
        try:
            if not os.fstat(self._descriptor).st_nlink:
                raise StateError(f"there is no {self._path} any more: restart the exporter")
            if of_rows != self._written:  # else it is there already
                number = (self._number + 1) % 2**64
                save = Save(number, self._boot, self._secret, rows)
                self._write(memoryview(compose(save)))
                self._number = number
                self._area = (self._area + 1) % AREAS
        except OSError as error:
            raise StateError(f"{self._path}: {error.strerror}") from error
        self._written = of_rows
        self.saved_s = time.time()

    def _write(self, save: memoryview) -> None:
        """Not in one go with the place, pwrite(2): a confined process may not do that."""
        for first in range(0, len(save), PIECE_BYTES):
            place = AREAS * first + self._area * PIECE_BYTES
            os.lseek(self._descriptor, place, os.SEEK_SET)
            left = save[first : first + PIECE_BYTES]
            while left:
                left = left[os.write(self._descriptor, left) :]


class _Aged:
    """Socket tables that tell what was saved, where that is of the same connection."""

    def __init__(self, tables: ConnectionTables, save: Save) -> None:
        self._tables = tables
        self._secret = save.secret
        self._rows = save.rows[np.argsort(save.rows["cookie"])]

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return self._tables.namespaces()

    def established(self, *, with_ages: bool) -> Records:
        """A time that was saved is a bound, too, where it was not told by the kernel."""
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
        found["group"][at] = groups(found["key"][at], saved["direction"])
        if len(at):
            log.info("the ages of %s connections were saved", len(at))
        return found


def _rows(connections: Records, secret: tuple[int, int]) -> Records:
    """Of dtype `ROW`.

    Raises:
        StateError: it is not known which sockets they are.
    """
    told = connections[connections["cookie"] != 0]
    if len(connections) and not len(told):
        raise StateError("/proc/net/tcp does not tell sockets apart, as sock_diag does")
    rows = np.zeros(len(told), ROW)
    rows["cookie"] = told["cookie"]
    rows["hash"] = hashes(told["key"], secret)
    rows["established_ns"] = told["established_ns"]
    rows["direction"] = directions(told["group"])
    return rows


def _require_own(path: Path, status: os.stat_result) -> None:
    others = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if status.st_uid != os.geteuid() or others or not stat.S_ISREG(status.st_mode):
        raise StateError(
            f"{path} is not ours alone, so what is in it cannot be trusted: it takes a file"
            " of mode 0600 that belongs to the user who starts the exporter"
        )


def _require_state(path: Path, beginning: bytes) -> None:
    """A new file is empty, and one that is not begins with a save, whole or not."""
    if beginning and beginning != MAGIC:
        raise StateError(
            f"{path} is not what an exporter saves: remove it, or choose one with --state"
        )
