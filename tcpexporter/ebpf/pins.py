# SPDX-License-Identifier: GPL-3.0-only
"""Lets the kernel go on recording when the exporter ends, and takes over what it recorded.

What a run of the exporter leaves in a directory of the BPF file system is a *generation*:
the attachment of its program, the connections, and how these are laid out. The next run
loads a program and maps of its own, whatever version it is of, and adds to them what
generations before it know, as it does with the socket tables: see `reconcile.seed`.
Only then they are removed. So there is one way from what was known to what is counted,
and an upgrade is no special case. For a connection, against that:

a. Open all the while: the old generation has it with the kernel's time.
b. Closes or opens while nobody runs: the old program is told, as always.
c. Closes or opens during the takeover: both programs are told. The new one has been
   attached first, and notes what closes; `reconcile` argues the cases.
d. Its closing was missed by the old generation: it is taken over, the socket tables do
   not show it, and the first reconciliation, at once, removes it.
e. Its opening was missed: the socket tables show it, as one from before.

A run that is killed at any step of the takeover leaves the old generation, or both: a
generation is complete once its attachment is there, which comes last and goes first.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.record import CONNECTION, KEY, Records
from tcpexporter.connections.snapshot import valid_connections
from tcpexporter.ebpf import reconcile
from tcpexporter.ebpf.connection_array import WINDOW, windows
from tcpexporter.ebpf.libbpf import BPF_MAP_TYPE_ARRAY, call, create_map
from tcpexporter.ebpf.loader_protocol import Descriptors
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.maps import FIRST, Map
from tcpexporter.ebpf.tracker import Tracker, map_errors
from tcpexporter.errors import PinError
from tcpexporter.host import libc, owned

log = logging.getLogger(__name__)

DEFAULT = "/sys/fs/bpf/tcpexporter"

LINK = "link"
CONNECTIONS = "connections"
LAYOUT = "layout"

BPF_FS_MAGIC = 0xCAFE4A11
"""``f_type`` of statfs(2): include/uapi/linux/magic.h."""

LAYOUT_MAGIC = 0x74637078
LAYOUT_WORDS = 16
"""Of 32 bits: the magic number, the bytes of a record, of its key, and where in these the
fields are, in the order of `FIELDS` and `KEY_FIELDS`; the rest is 0."""

FIELDS = ("established_ns", "key", "group")
"""Of `CONNECTION`, what the next run takes over."""

KEY_FIELDS = ("local_address", "remote_address", "netns", "local_port", "remote_port")
"""Of `KEY`; the order is the layout's, and not to be changed."""

UNMOUNTED = "mount -t bpf bpf /sys/fs/bpf"


class Pins:
    """A directory for one exporter at a time."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        """Take one that is locked by its descriptor: see `open`."""
        self.taken_over = 0
        """How many connections generations before this one knew."""
        self._directory = directory
        self._descriptor = descriptor

    @classmethod
    def open(cls, directory: Path, *, to_remove: bool = False) -> Self | None:
        """Have a directory, which is made if need be, until `close`.

        None where there is no BPF file system: that is logged, as it does not keep the
        exporter from counting.

        Args:
            directory: it must be ours alone.
            to_remove: unless it is only to be emptied, by root: the unit's belongs to a
                user who is gone when the service is.

        Raises:
            PinError: it belongs to somebody else, or another exporter has it.
        """
        try:
            there = directory if directory.exists() else directory.parent
            if not _is_bpf_file_system(there):
                log.warning(
                    "nothing is pinned: %s is not in a BPF file system, which %s mounts",
                    there,
                    UNMOUNTED,
                )
                return None
            directory.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            descriptor = os.open(directory, flags)
        except OSError as error:
            raise PinError(f"{directory} cannot be used: {error.strerror}") from error
        try:
            if not (to_remove and os.geteuid() == 0):
                owned.require_own(directory, os.fstat(descriptor), PinError)
            owned.lock(directory, descriptor, PinError, setting="--pin")
        except PinError:
            os.close(descriptor)
            raise
        return cls(directory, descriptor)

    def close(self) -> None:
        """Let another exporter have it; what is there stays."""
        os.close(self._descriptor)

    def take_over(self, tracker: Tracker, *, netns: int) -> None:
        """Add what generations before know to a tracker, which is attached already.

        Args:
            tracker: of this run.
            netns: inode of the only network namespace to take, 0: all.

        Raises:
            PinError: an object there is not what it should be.
            TrackerError: the kernel refuses a map operation.
        """
        for each in self._generations():
            if (each / LINK).exists():
                with _Generation.open(each, netns) as generation:
                    reconcile.seed(tracker, generation)
                    self.taken_over += generation.found
        if self.taken_over:
            log.info("adopted %s connections of the previous run", self.taken_over)

    def leave(self, descriptors: Descriptors) -> None:
        """Make this run the only generation.

        Raises:
            PinError: the kernel refuses it.
        """
        before = self._generations()
        number = 1 + max((int(each.name) for each in before), default=0)
        generation = self._directory / str(number)
        try:
            generation.mkdir(mode=0o700)
            layout = _make_layout()
            _pin(layout, generation / LAYOUT)
            os.close(layout)
            _pin(descriptors.connections, generation / CONNECTIONS)
            _pin(descriptors.link, generation / LINK)
        except OSError as error:
            raise PinError(f"{generation} cannot be filled: {error.strerror}") from error
        for each in before:
            self._remove(each)

    def remove(self) -> None:
        """Detach what generations before have attached, and forget what they know.

        Raises:
            PinError: the kernel refuses it.
        """
        for each in self._generations():
            self._remove(each)
        try:
            self._directory.rmdir()
        except OSError as error:
            raise _not_removed(self._directory, error) from error

    def _remove(self, generation: Path) -> None:
        """The attachment first: without it the rest is not taken for a generation.

        By descriptors alone: whoever owns the directory is not to lead root elsewhere.
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

    def _generations(self) -> list[Path]:
        """Each in its directory, the oldest first."""
        found = [each for each in self._directory.iterdir() if each.name.isdecimal()]
        return sorted(found, key=lambda each: int(each.name))


def remove(directory: str) -> None:
    """Have nothing outlive the exporter any more.

    Raises:
        PinError: an exporter still runs, or the kernel refuses it.
    """
    path = Path(directory)
    pins = Pins.open(path, to_remove=True) if path.exists() else None
    if pins:
        with contextlib.closing(pins):
            pins.remove()


class _Generation:
    """What an exporter before this one left, to be looked at as the socket tables are."""

    def __init__(self, array: MappedArray, entries: int, netns: int) -> None:
        self.found = 0
        self._array = array
        self._entries = entries
        self._netns = netns

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, netns: int) -> Iterator[Self]:
        with contextlib.ExitStack() as undo:
            _, shown = _get(directory / LINK, undo)
            if "link_type" not in shown:
                raise _not_ours(directory / LINK)
            layout, shown = _get(directory / LAYOUT, undo)
            _require(directory / LAYOUT, shown, value_size=4 * LAYOUT_WORDS, max_entries=1)
            record = _read_layout(directory / LAYOUT, layout)
            connections, shown = _get(directory / CONNECTIONS, undo)
            _require(directory / CONNECTIONS, shown, value_size=record.itemsize)
            entries = _number(directory / CONNECTIONS, shown, "max_entries")
            with map_errors():
                array = MappedArray(connections, record, entries, WINDOW)
            yield cls(array, entries, netns)

    def established(self, *, with_ages: bool) -> Records:  # noqa: ARG002  it always has them
        """What it knows, the newest first, of dtype `SOCKET`.

        `Tracker.add` takes the first of those with the same key: an older one is there
        because its closing was missed.
        """
        with map_errors():
            parts = map(valid_connections, windows(self._array, self._entries))
            known = np.concatenate(list(parts))
        if self._netns:
            known = known[known["key"]["netns"] == self._netns]
        self.found = len(known)
        return known[np.argsort(known["established_ns"])[::-1]]

    def namespaces(self) -> npt.NDArray[np.uint32]:
        """None: what it does not know may be there all the same."""
        return np.empty(0, np.uint32)


def _make_layout() -> int:
    """The descriptor of a map that says how `CONNECTION` is laid out."""
    words = np.zeros(LAYOUT_WORDS, np.uint32)
    said = [LAYOUT_MAGIC, CONNECTION.itemsize, KEY.itemsize, *_offsets(CONNECTION, FIELDS)]
    said += _offsets(KEY, KEY_FIELDS)
    words[: len(said)] = said
    descriptor = create_map(BPF_MAP_TYPE_ARRAY, 4, words.nbytes)
    _write(descriptor, words)
    return descriptor


def _write(layout: int, words: npt.NDArray[np.uint32]) -> None:
    key = ctypes.byref(ctypes.c_uint32(0))
    value = words.ctypes.data_as(ctypes.c_void_p)
    call("bpf_map_update_elem", layout, key, value, ctypes.c_uint64(0))


def _offsets(dtype: np.dtype[Any], names: tuple[str, ...]) -> list[int]:
    fields: Mapping[str, tuple[Any, ...]] = dtype.fields or {}
    return [fields[name][1] for name in names]


def _read_layout(path: Path, descriptor: int) -> np.dtype[Any]:
    words = np.zeros(LAYOUT_WORDS, np.uint32)
    with map_errors():
        Map(descriptor, "layouts").read(FIRST, words)
    return _record(path, words)


def _record(path: Path, words: npt.NDArray[np.uint32]) -> np.dtype[Any]:
    """The part of a record that is taken over, wherever that version had it.

    Raises:
        PinError: it is no layout, or one that has fields outside of the record.
    """
    magic, record_bytes, key_bytes, *offsets = words.tolist()
    # In C it has numbers of 64 bits, so its size is a multiple of that; the kernel has each
    # element at one in any case: array_map_alloc in its kernel/bpf/arraymap.c.
    if magic != LAYOUT_MAGIC or record_bytes % 8:
        raise _not_ours(path)
    try:
        key = _laid_out(KEY, KEY_FIELDS, offsets[len(FIELDS) :], key_bytes)
        return _laid_out(CONNECTION, FIELDS, offsets, record_bytes, key=key)
    except ValueError:
        raise _not_ours(path) from None


def _laid_out(
    dtype: np.dtype[Any],
    names: tuple[str, ...],
    offsets: list[int],
    itemsize: int,
    **instead: np.dtype[Any],
) -> np.dtype[Any]:
    """Some fields of a dtype, as another version has them."""
    formats = [instead.get(name, dtype[name]) for name in names]
    places = offsets[: len(names)]
    # numpy sees to that too, but in numbers of 32 bits, and then reads anywhere.
    ends = (at + each.itemsize for at, each in zip(places, formats, strict=True))
    if max(ends) > itemsize:
        raise ValueError(itemsize)
    return np.dtype(
        {"names": names, "formats": formats, "offsets": places, "itemsize": itemsize}
    )


def _get(path: Path, undo: contextlib.ExitStack) -> tuple[int, dict[str, str]]:
    """A pinned object, and what the kernel shows of it: bpf_map_show_fdinfo."""
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
    """See that it is an array, and as expected."""
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


def _is_bpf_file_system(path: Path) -> bool:
    return libc.file_system_type(path) == BPF_FS_MAGIC
