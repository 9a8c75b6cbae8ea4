# SPDX-License-Identifier: GPL-3.0-only
"""Writes the exposition to a file atomically (--output).

The process that makes the exposition is confined and no longer root: it can write to an
open file, but cannot rename a file. So before it is confined, it opens a new file in the
same directory and starts a child process that keeps its privileges. When the parent reports
that the file is complete, the child renames the new file to the path. If the parent ends
without reporting that, the child removes the new file.
"""

import contextlib
import errno
import os
import secrets
import signal
import stat
from pathlib import Path

from tcpexporter.errors import ServerError

MODE = 0o644
"""The mode of the file: every user can read it, because node_exporter is not root."""

COMPLETE = b"!"

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Output:
    """A new file, which `publish` writes and renames to the path."""

    def __init__(self, path: str) -> None:
        """Open the new file and start the child process; call it before threads start.

        Raises:
            ServerError: the new file cannot be opened, or the path exists and is not a
                regular file.
        """
        self._path = path
        try:
            _require_regular(path)
            directory = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY)
            try:
                self._start(directory, Path(path).name)
            finally:
                os.close(directory)
        except OSError as error:
            raise self._failed(error.errno or 0) from error

    def _start(self, directory: int, name: str) -> None:
        # node_exporter reads only files whose names end with .prom.
        new = f".{name}.{secrets.token_hex(4)}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with contextlib.ExitStack() as undo:
            # Ctrl-C in a terminal sends SIGINT to both processes. The child must survive it
            # to remove the file, so it never unblocks these signals.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            self._file = os.open(new, flags, MODE, dir_fd=directory)
            undo.callback(os.close, self._file)
            undo.callback(os.unlink, new, dir_fd=directory)
            os.fchmod(self._file, MODE)  # independent of the umask
            complete, self._channel = os.pipe()
            undo.callback(os.close, self._channel)
            with os.fdopen(complete, "rb", buffering=0):
                self._child = os.fork()
                if not self._child:
                    os.close(self._channel)
                    os._exit(_publish(complete, self._file, directory, new, name))
            undo.pop_all()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def publish(self, exposition: bytes) -> None:
        """Write the exposition, and let the child process rename the new file to the path.

        Raises:
            ServerError: one of these steps failed; the old file is unchanged.
        """
        left = exposition
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.write(self._channel, COMPLETE)
        except OSError as error:
            raise self._failed(error.errno or 0) from error
        code = self._end()
        if code > 0:
            raise self._failed(code)
        if code < 0:
            how = signal.Signals(-code).name
            raise ServerError(f"cannot write {self._path}: the child process died ({how})")

    def close(self) -> None:
        """Let the child process remove the new file, unless `publish` has renamed it."""
        if self._child:
            self._end()

    def _end(self) -> int:
        """Close the files and wait for the child process.

        Return its errno, 0 if it has succeeded, or the negated signal that killed it.
        """
        os.close(self._file)
        os.close(self._channel)
        child, self._child = self._child, 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _failed(self, number: int) -> ServerError:
        if number == errno.ENOENT:
            directory = Path(self._path).parent
            return ServerError(
                f"cannot write {self._path}: the directory {directory} does not exist:"
                " create it, or choose another path with --output"
            )
        return ServerError(f"cannot write {self._path}: {os.strerror(number)}")


def _require_regular(path: str) -> None:
    """Refuse a device or a symbolic link (/dev/stdout): a rename would replace it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ServerError(f"cannot write {path}: it exists and is not a regular file")


def _publish(complete: int, file: int, directory: int, new: str, name: str) -> int:
    """In the child, wait, then rename or remove the new file; return an errno, or 0."""
    try:
        if os.read(complete, len(COMPLETE)):
            os.fsync(file)  # without it, a crash of the host could leave an empty file
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
            return 0
        os.unlink(new, dir_fd=directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory)
        return error.errno or 1
    return 0
