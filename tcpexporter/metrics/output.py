# SPDX-License-Identifier: GPL-3.0-only
"""Puts a page into a file: the whole page, or the file stays as it was.

The process that makes the page is confined and no longer root when the page is ready. It
can write to a file that is open, but not rename one. So before that it opens a new file in
the same directory, and starts a child process that keeps its rights. The child does one
thing: when it is told that the page is complete, it puts the new file in place of the old
one; when its parent ends without saying so, it removes the new file.
"""

import contextlib
import os
import secrets
import signal
import stat
from pathlib import Path

from tcpexporter.errors import ServerError

MODE = 0o644
"""node_exporter runs as another user."""

COMPLETE = b"!"

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Output:
    """The new file, which is in place after `publish`."""

    def __init__(self, path: str) -> None:
        """Open it, and start the child process: call this while there is one thread alone.

        Raises:
            ServerError: the file cannot be written.
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
        # With another ending, which node_exporter does not read.
        new = f".{name}.{secrets.token_hex(4)}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with contextlib.ExitStack() as undo:
            # Ctrl-C at a terminal is for both processes, and one of them has to clean up:
            # the child never unblocks them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            self._file = os.open(new, flags, MODE, dir_fd=directory)
            undo.callback(os.close, self._file)
            undo.callback(os.unlink, new, dir_fd=directory)
            os.fchmod(self._file, MODE)  # whatever the umask is
            complete, self._channel = os.pipe()
            undo.callback(os.close, self._channel)
            with os.fdopen(complete, "rb", buffering=0):
                self._child = os.fork()
                if not self._child:
                    os.close(self._channel)
                    os._exit(_publish(complete, self._file, directory, new, name))
            undo.pop_all()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def publish(self, page: bytes) -> None:
        """Write the page and have it put in place.

        Raises:
            ServerError: that failed, and the file is as it was.
        """
        left = page
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
        """Remove the new file if it was not published."""
        if self._child:
            self._end()

    def _end(self) -> int:
        """Close all and wait for the child: its errno, or minus its signal."""
        os.close(self._file)
        os.close(self._channel)
        child, self._child = self._child, 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _failed(self, number: int) -> ServerError:
        return ServerError(f"cannot write {self._path}: {os.strerror(number)}")


def _require_regular(path: str) -> None:
    """A rename would replace a device or a symbolic link, such as /dev/stdout, too."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ServerError(f"cannot write {path}: it is there and not a regular file")


def _publish(complete: int, file: int, directory: int, new: str, name: str) -> int:
    """In the child: wait, then rename or remove; the errno of a failure, else 0."""
    try:
        if os.read(complete, len(COMPLETE)):
            os.fsync(file)  # or a crash of the host leaves an empty file
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
            return 0
        os.unlink(new, dir_fd=directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory)
        return error.errno or 1
    return 0
