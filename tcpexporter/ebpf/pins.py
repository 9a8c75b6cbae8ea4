# SPDX-License-Identifier: GPL-3.0-only
"""Pins BPF maps, so that recording continues while the exporter is down, and adopts them.

Each run of the exporter leaves a *generation* in a directory of the BPF file system: the
attachment of its program, the array of connections, the ledger, and a description of their
layout. The next run, which may be of another version, loads its own program and maps. It
adds the connections of previous generations to them, as it adds those of the socket tables
(`reconcile.seed`), and only then removes these generations. So there is one way to add
pre-existing connections, and an upgrade is no special case. The cases for a connection:

a. Stays open: the old generation has it with the kernel's time.
b. Closes or opens while no exporter runs: the kernel reports it to the old program.
c. Closes or opens during the adoption: the kernel reports it to both programs. The new
   program was attached first, and records closings; see the cases in `reconcile`.
d. The old program missed its closing: it is adopted, but the socket tables do not show it.
   The first reconciliation follows at once and removes it.
e. The old program missed its opening: it is added from the socket tables.

The counters of the ledger continue. Both programs count what happens during the adoption,
so the new run subtracts what its own program has counted by then (`SeriesNumbers.adopt`).
The two ledgers are not read at one moment, but an event in between is counted at most once.
If the settings count other series than the previous run, or other buckets, counters begin
at 0.

A run that is killed at any step of the adoption leaves the old generation, or both: a
generation is complete once it has its attachment, which is pinned last and removed first.
"""

import contextlib
import ctypes
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.identity import hashes
from tcpexporter.connections.record import Records
from tcpexporter.connections.series import (
    Ledger,
    bucket_count,
    correction_dtype,
    entry_dtype,
)
from tcpexporter.connections.snapshot import (
    valid_connections,
    valid_old_connections,
    with_cgroups,
)
from tcpexporter.connections.source import ConnectionTables
from tcpexporter.ebpf import pin_directory, pinned_layout, reconcile
from tcpexporter.ebpf.connection_array import WINDOW, ConnectionArray, old_windows
from tcpexporter.ebpf.libbpf import BPF_MAP_TYPE_ARRAY, call, create_map
from tcpexporter.ebpf.loader_protocol import Descriptors, Request
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import FIRST, Map, map_errors
from tcpexporter.ebpf.pinned_layout import Layout
from tcpexporter.ebpf.series_numbers import ledger_of
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import PinError
from tcpexporter.host import owned

log = logging.getLogger(__name__)

DEFAULT = "/sys/fs/bpf/tcpexporter"

LINK = "link"
CONNECTIONS = "connections"
LAYOUT = "layout"
WORDS = "series_and_time"
LEDGER = "ledger"
CORRECTIONS = "corrections"


class Pins:
    """A directory of the BPF file system, which only one exporter uses at a time."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        """Use a directory and its descriptor, by which `open` has locked it."""
        self.adopted = 0
        """Number of connections that were adopted from previous generations."""
        self._directory = directory
        self._descriptor = descriptor

    @classmethod
    def open(cls, directory: Path, *, to_remove: bool = False) -> Self | None:
        """Create the directory if necessary, and lock it until `close`.

        Args:
            directory: the path of the directory. No other user may have access to it.
            to_remove: whether the caller only removes its content. Then root may use a
                directory of any user. The directory of the systemd unit belongs to a user
                that exists only while the service runs.

        Returns:
            The locked directory; None if it is not in a BPF file system. Then a warning is
            logged, and the exporter counts without it.

        Raises:
            PinError: another user has access to it, or another exporter has locked it.
        """
        descriptor = pin_directory.open_locked(directory, to_remove=to_remove)
        return None if descriptor is None else cls(directory, descriptor)

    def close(self) -> None:
        """Unlock the directory; its content stays."""
        os.close(self._descriptor)

    def has_generation(self) -> bool:
        """Return whether a previous run has left a generation to adopt."""
        return bool(self._complete())

    def adopt(self, tracker: Tracker, request: Request, tables: ConnectionTables) -> None:
        """Add the connections of previous generations to a tracker, and their counters.

        Args:
            tracker: of this run; its program is already attached.
            request: the one that its program was loaded for.
            tables: the socket tables, for cgroups that the previous run has not recorded.

        Raises:
            PinError: a pinned object is not of the expected kind.
            TrackerError: the kernel refuses a map operation.
        """
        complete = self._complete()
        for each in complete:
            with _Generation.open(each, request, tables) as generation:
                reconcile.seed(tracker, generation)
                self.adopted += generation.found
                # The newest generation includes the counters of the previous ones.
                ledger = generation.ledger() if each == complete[-1] else None
                if ledger:
                    tracker.series.adopt(ledger)
                elif each == complete[-1]:
                    log.info("the settings count other series: counters begin at 0")
        if self.adopted:
            log.info("adopted %s connections of the previous run", self.adopted)

    def pin(self, descriptors: Descriptors, request: Request) -> None:
        """Pin this run as a generation, and remove the previous ones.

        Args:
            descriptors: of this run's program and maps.
            request: the one that its program was loaded for.

        Raises:
            PinError: the kernel refuses to pin or remove an object.
        """
        before = self._generations()
        number = 1 + max((int(each.name) for each in before), default=0)
        generation = self._directory / str(number)
        try:
            generation.mkdir(mode=0o700)
            layout = _make_layout(request)
            _pin(layout, generation / LAYOUT)
            os.close(layout)
            _pin(descriptors.connections, generation / CONNECTIONS)
            _pin(descriptors.series_and_time, generation / WORDS)
            _pin(descriptors.ledger, generation / LEDGER)
            _pin(descriptors.corrections, generation / CORRECTIONS)
            _pin(descriptors.link, generation / LINK)
        except OSError as error:
            raise PinError(f"{generation} cannot be filled: {error.strerror}") from error
        for each in before:
            self._remove(each)
        directory = self._directory
        if directory.is_mount():
            # The systemd unit mounts it at a path that only the service sees.
            log.info("pinned in %s", directory)
        else:
            how = f"tcpexporter --unpin --pin {directory}"
            log.info("pinned in %s; %s removes it", directory, how)

    def remove(self) -> bool:
        """Remove the directory and all generations, which detaches their programs.

        Returns:
            Whether there was a generation.

        Raises:
            PinError: the kernel refuses to remove an object.
        """
        generations = self._generations()
        for each in generations:
            self._remove(each)
        try:
            self._directory.rmdir()
        except OSError as error:
            raise _not_removed(self._directory, error) from error
        return bool(generations)

    def _remove(self, generation: Path) -> None:
        """Remove a generation; its attachment first, so that it is no longer complete.

        The paths are relative to descriptors. So the owner of the directory cannot redirect
        root to another directory by a symbolic link.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            opened = os.open(generation.name, flags, dir_fd=self._descriptor)
            try:
                with os.scandir(opened) as entries:
                    names = [each.name for each in entries]
                for name in sorted(names, key=lambda each: each != LINK):
                    os.unlink(name, dir_fd=opened)
            finally:
                os.close(opened)
            os.rmdir(generation.name, dir_fd=self._descriptor)
        except OSError as error:
            raise _not_removed(generation, error) from error

    def _complete(self) -> list[Path]:
        """Return the directories of generations whose program still records."""
        return [each for each in self._generations() if (each / LINK).exists()]

    def _generations(self) -> list[Path]:
        """Return the directories of all generations, the oldest first."""
        found = [each for each in self._directory.iterdir() if each.name.isdecimal()]
        return sorted(found, key=lambda each: int(each.name))


def remove(directory: Path) -> bool:
    """Remove a directory of pins if it exists, which ends the recording.

    Returns:
        Whether a run was pinned there.

    Raises:
        PinError: an exporter still uses it, or the kernel refuses to remove it.
    """
    if not pin_directory.exists(directory):
        return False
    pins = Pins.open(directory, to_remove=True)
    if pins is None:
        return False
    with contextlib.closing(pins):
        return pins.remove()


class _Generation:
    """The connections of a previous run, with the interface of socket tables."""

    def __init__(
        self,
        read: Callable[[], Iterator[Records]],
        request: Request,
        ledger: Callable[[], Ledger | None],
        tables: ConnectionTables,
    ) -> None:
        self.found = 0
        self.ledger = ledger
        """A function that returns the ledger; None: the run counted other series."""
        self._read = read
        self._request = request
        self._tables = tables

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, directory: Path, request: Request, tables: ConnectionTables
    ) -> Iterator[Self]:
        with contextlib.ExitStack() as undo:
            _, shown = _get(directory / LINK, undo)
            if "link_type" not in shown:
                raise _not_ours(directory / LINK)
            layout = _read_layout(directory, request, undo)
            connections, shown = _get(directory / CONNECTIONS, undo)
            _require(directory / CONNECTIONS, shown, value_size=layout.record.itemsize)
            slots = _number(directory / CONNECTIONS, shown, "max_entries")
            if layout.is_old:
                with map_errors():
                    array = MappedArray(connections, layout.record, slots, WINDOW)
                read = partial(_old_connections, array, slots)
            else:
                words, shown = _get(directory / WORDS, undo)
                _require(directory / WORDS, shown, value_size=8, max_entries=slots)
                with map_errors():
                    pair = ConnectionArray(connections, words, slots, layout.record)
                read = partial(_connections, pair)

            def read_ledger() -> Ledger | None:
                if not layout.is_continued:
                    return None
                return _read_ledger(directory, request, undo)

            yield cls(read, request, read_ledger, tables)

    def established(self, *, with_ages: bool) -> Records:  # noqa: ARG002  all have ages
        """Return the connections, of dtype `SOCKET`; of those with equal keys, the newest.

        The program missed the closings of the older ones.

        Raises:
            TrackerError: the kernel refuses to map the arrays.
            SocketTableError: cgroups are required, and the tables cannot be read.
        """
        with map_errors():
            known = np.concatenate(list(self._read()))
        if only := self._request.netns:
            known = known[known["key"]["netns"] == only]
        self.found = len(known)
        if self._request.by_cgroup and not known["cgroup"].all():
            with_cgroups(known, self._tables.established(with_ages=False))
        return _newest(known)

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """Return no namespace: a generation may lack connections of any namespace."""
        return np.empty(0, np.uint32)


def _newest(connections: Records) -> Records:
    """Return the connections, or only the newest of each key if keys are not distinct."""
    found = hashes(connections["key"])
    ordered = np.sort(found)
    if not (ordered[1:] == ordered[:-1]).any():
        return connections
    newest_first = np.argsort(connections["established_ns"])[::-1]
    _, first = np.unique(found[newest_first], return_index=True)
    newest: Records = connections[newest_first[first]]
    return newest


def _connections(array: ConnectionArray) -> Iterator[Records]:
    return itertools.starmap(valid_connections, array.windows())


def _old_connections(array: MappedArray, slots: int) -> Iterator[Records]:
    return map(valid_old_connections, old_windows(array, slots))


def _make_layout(request: Request) -> int:
    """Create a map that describes the layout of the others; return its descriptor."""
    words = pinned_layout.make(request)
    descriptor = create_map(BPF_MAP_TYPE_ARRAY, 4, words.nbytes)
    key = ctypes.byref(ctypes.c_uint32(0))
    value = words.ctypes.data_as(ctypes.c_void_p)
    call("bpf_map_update_elem", descriptor, key, value, ctypes.c_uint64(0))
    return descriptor


def _read_layout(directory: Path, request: Request, undo: contextlib.ExitStack) -> Layout:
    path = directory / LAYOUT
    descriptor, shown = _get(path, undo)
    _require(path, shown, value_size=4 * pinned_layout.LAYOUT_WORDS, max_entries=1)
    words = np.zeros(pinned_layout.LAYOUT_WORDS, np.uint32)
    with map_errors():
        Map(descriptor, "layouts").read(FIRST, words)
    try:
        return pinned_layout.read(words, request)
    except ValueError:
        raise _not_ours(path) from None


def _read_ledger(
    directory: Path, request: Request, undo: contextlib.ExitStack
) -> Ledger | None:
    buckets = bucket_count(request.lifetime_bounds)
    dtypes = {LEDGER: entry_dtype(buckets), CORRECTIONS: correction_dtype(buckets)}
    arrays = []
    for name, entry in dtypes.items():
        path = directory / name
        descriptor, shown = _get(path, undo)
        _require(path, shown, value_size=entry.itemsize)
        entries = _number(path, shown, "max_entries")
        with map_errors():
            arrays.append(MappedArray(descriptor, entry, entries, entries).upto(entries))
    ledger, corrections = arrays
    if len(ledger) != len(corrections):
        raise _not_ours(directory / CORRECTIONS)
    return ledger_of(ledger, corrections)


def _get(path: Path, undo: contextlib.ExitStack) -> tuple[int, dict[str, str]]:
    """Return a descriptor of a pinned object, and its fdinfo (bpf_map_show_fdinfo)."""
    try:
        owned.require_own(path, path.stat(), PinError)
        descriptor = call("bpf_obj_get", os.fsencode(path))
        undo.callback(os.close, descriptor)
        content = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes()
    except OSError as error:
        raise PinError(f"{path} cannot be used: {error.strerror}") from error
    return descriptor, _shown(content)


def _shown(fdinfo: bytes) -> dict[str, str]:
    lines = (each.partition(":") for each in fdinfo.decode(errors="replace").split("\n"))
    return {name: value.strip() for name, _, value in lines}


def _number(path: Path, shown: dict[str, str], name: str) -> int:
    try:
        return int(shown[name])
    except (KeyError, ValueError):
        raise _not_ours(path) from None


def _require(path: Path, shown: dict[str, str], **expected: int) -> None:
    """Raise PinError unless a map is an array with the expected properties."""
    expected |= {"map_type": BPF_MAP_TYPE_ARRAY, "key_size": 4}
    if any(shown.get(name) != str(value) for name, value in expected.items()):
        raise _not_ours(path)


def _not_ours(path: Path) -> PinError:
    return PinError(
        f"{path} is not an object that an exporter has pinned: remove it with"
        f" tcpexporter --unpin --pin {path.parents[1]}"
    )


def _pin(descriptor: int, path: Path) -> None:
    call("bpf_obj_pin", descriptor, os.fsencode(path))


def _not_removed(path: Path, error: OSError) -> PinError:
    return PinError(f"{path} cannot be removed: {error.strerror}")
