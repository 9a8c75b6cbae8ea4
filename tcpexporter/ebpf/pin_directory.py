# SPDX-License-Identifier: GPL-3.0-only
"""Finds, checks and locks the directory of --pin."""

import contextlib
import errno
import logging
import os
from pathlib import Path

from tcpexporter.errors import PinError
from tcpexporter.host import libc, owned

log = logging.getLogger(__name__)

BPF_FS = Path("/sys/fs/bpf")
"""Where systemd mounts the BPF file system."""

BPF_FS_MAGIC = 0xCAFE4A11
"""``f_type`` of statfs(2): include/uapi/linux/magic.h."""

OPEN_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
"""Flags of open(2): the kernel refuses a symbolic link, and anything but a directory."""


def exists(directory: Path) -> bool:
    """Return whether there is a directory at this path.

    Raises:
        PinError: this user may not look it up.
    """
    try:
        return directory.exists()
    except OSError as error:
        raise _unusable(directory, error) from error


def open_locked(directory: Path, *, to_remove: bool = False) -> int | None:
    """Create the directory if necessary, and lock it until the descriptor is closed.

    Args:
        directory: as for `Pins.open`.
        to_remove: as for `Pins.open`.

    Returns:
        A descriptor; None if the directory is not in a BPF file system. Then a warning is
        logged.

    Raises:
        PinError: another user has access to it, or another exporter has locked it.
    """
    try:
        if not _is_in_bpf_file_system(directory):
            return None
        directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(directory, OPEN_FLAGS)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        if not (to_remove and os.geteuid() == 0):
            owned.require_own(directory, os.fstat(descriptor), PinError)
        owned.lock(directory, descriptor, PinError, setting="--pin")
    except PinError:
        os.close(descriptor)
        raise
    return descriptor


def check(directory: Path) -> bool:
    """Check what `open_locked` requires, but create and lock nothing.

    Returns:
        Whether the directory is in a BPF file system; if not, a warning is logged.

    Raises:
        PinError: the directory cannot be used.
    """
    try:
        if not _is_in_bpf_file_system(directory):
            return False
        if not os.path.lexists(directory):
            if not os.access(directory.parent, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return True
        with contextlib.ExitStack() as undo:
            descriptor = os.open(directory, OPEN_FLAGS)
            undo.callback(os.close, descriptor)
            owned.require_own(directory, os.fstat(descriptor), PinError)
    except OSError as error:
        raise _unusable(directory, error) from error
    return True


def is_bpf_file_system(path: Path) -> bool:
    """Return whether an existing path is in a BPF file system.

    Raises:
        OSError: the path cannot be looked up.
    """
    return libc.file_system_type(path) == BPF_FS_MAGIC


def _is_in_bpf_file_system(directory: Path) -> bool:
    """Return whether the directory is, or would be, in a BPF file system; warn if not."""
    if is_bpf_file_system(directory if directory.exists() else directory.parent):
        return True
    if BPF_FS.is_dir() and is_bpf_file_system(BPF_FS):
        remedy = f"choose a directory below {BPF_FS}"
    else:
        remedy = f"to mount one: mount -t bpf bpf {BPF_FS}"
    log.warning("nothing is pinned: %s is not in a BPF file system; %s", directory, remedy)
    return False


def _unusable(directory: Path, error: OSError) -> PinError:
    remedy = {
        errno.ENOENT: f": create {directory.parent}, or choose another with --pin",
        errno.EACCES: ": start as root, or choose another with --pin",
    }.get(error.errno or 0, "")
    return PinError(f"{directory} cannot be used: {error.strerror}{remedy}")
