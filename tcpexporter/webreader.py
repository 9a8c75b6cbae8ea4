# SPDX-License-Identifier: GPL-3.0-only
"""Reads the web configuration and the files it names, in a child that goes on watching.

A key is readable by root alone, as a rule, and whoever serves is root no more when the
key is replaced; it may not be able to open any file by then. So a child that no client
can talk to keeps what it takes to read, and nothing else, for as long as its parent
lives. It sends all that there is to know whenever that has changed.
"""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pwd import struct_passwd

from tcpexporter import privileges
from tcpexporter.errors import WebConfigError
from tcpexporter.webconfig import WebConfig

INTERVAL_S = 1.0
"""Between two looks at the files. What has changed is read when it has not for so long:
a certificate and its key are two files, and some write them piece by piece."""

LARGEST_BYTES = 1 << 20
"""Of a file; a bundle of all public certificate authorities has a quarter of that."""

GRACE_S = 0.3
"""What the child gets to see that nobody listens any more."""

_LENGTH = struct.Struct("!I")

Parse = Callable[[str, str, Callable[[str], str]], WebConfig]

_Look = tuple[int, ...] | None
"""What a file looks like from outside; None: not there."""


class ReaderGoneError(Exception):
    """The child has ended, so changes are not read any more."""


class Reader:
    """The child, as its parent has it."""

    def __init__(
        self, path: str, account: struct_passwd | None, *, interval_s: float = INTERVAL_S
    ) -> None:
        """Start it.

        Args:
            path: Of the web configuration.
            account: Whom it becomes, as `privileges.keep_reading` has it.
            interval_s: Between two looks.
        """
        self._socket, theirs = socket.socketpair()
        user = account.pw_name if account else ""
        with theirs:
            self._child = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "tcpexporter.webreader"),
                    *(str(theirs.fileno()), str(interval_s), user, path),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    @property
    def process(self) -> int:
        """Its process id."""
        return self._child.pid

    def receive(self) -> WebConfig:
        """Wait for what there is at the start, later for what has changed.

        Raises:
            WebConfigError: it cannot be used.
            ReaderGoneError: nothing will come any more.
        """
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        told = json.loads(self._take(length))
        if refused := told.get("refused"):
            raise WebConfigError(refused)
        return WebConfig.from_json(told)

    def close(self) -> None:
        """End it, which it does by itself when nobody listens, unless it hangs."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):  # it may be root, and we not
                self._child.kill()
                self._child.wait()

    def _take(self, length: int) -> bytes:
        try:
            taken = self._socket.recv(length, socket.MSG_WAITALL)
        except OSError as error:
            raise ReaderGoneError from error
        if len(taken) < length:
            raise ReaderGoneError
        return taken


class _Files:
    """What has been read, and what it looked like."""

    def __init__(self) -> None:
        self.looks: dict[str, _Look] = {}

    def changed(self) -> bool:
        return self.looks != {path: _look(path) for path in self.looks}

    def read(self, path: str) -> str:
        """The text of a file, whatever bytes it has.

        Raises:
            WebConfigError: it cannot be had.
        """
        self.looks[path] = None
        try:
            # Not to wait for whoever has the other end of a pipe.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                self.looks[path] = _as_look(status)
                if not stat.S_ISREG(status.st_mode):
                    raise WebConfigError(f"{path} is not a regular file")
                content = file.read(LARGEST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            remedy = ""
            if isinstance(error, PermissionError):
                remedy = f": let user {os.geteuid()} read it, or start as root"
            raise WebConfigError(f"{path} cannot be read: {reason}{remedy}") from error
        if len(content) > LARGEST_BYTES:
            raise WebConfigError(f"{path} is larger than {LARGEST_BYTES} bytes")
        return content.decode(errors="surrogateescape")


def _look(path: str) -> _Look:
    try:
        return _as_look(Path(path).stat())
    except (OSError, ValueError):
        return None


def _as_look(status: os.stat_result) -> _Look:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _message(path: str, files: _Files, parse: Parse) -> bytes:
    directory = Path(path).parent
    try:
        text = files.read(path)
        told = asdict(parse(text, path, lambda name: files.read(str(directory / name))))
    except WebConfigError as error:
        told = {"refused": str(error)}
    return json.dumps(told).encode()


def _watch(parent: socket.socket, path: str, interval_s: float, parse: Parse) -> None:
    """Send what is read, now and whenever it has changed, until the parent is gone."""
    gone = select.poll()
    gone.register(parent, select.POLLIN)
    sent = b""
    while True:
        files = _Files()
        message = _message(path, files, parse)
        if message != sent:
            parent.sendall(_LENGTH.pack(len(message)) + message)
            sent = message
        while not files.changed():
            if gone.poll(interval_s * 1000):
                return
        looks = None
        while looks != (looks := {each: _look(each) for each in files.looks}):
            if gone.poll(interval_s * 1000):
                return


def _main(descriptor: str, interval_s: str, user: str, path: str) -> None:
    from tcpexporter.webformat import parse  # noqa: PLC0415  # not for the parent: 2 MiB

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's to answer
    with socket.socket(fileno=int(descriptor)) as parent:
        privileges.keep_reading(privileges.find_user(user) if user else None)
        with contextlib.suppress(ConnectionError):
            _watch(parent, path, float(interval_s), parse)


if __name__ == "__main__":
    _main(*sys.argv[1:])
