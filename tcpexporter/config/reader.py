# SPDX-License-Identifier: GPL-3.0-only
"""Reads the configuration files in a child process, at the start and when they change.

Usually only root can read a private key. When the key is replaced, the serving process is
no longer root and cannot open any file. So a child process keeps one privilege, to read
files, until its parent ends. No client can reach the child. It sends the web configuration,
with the content of the files that the configuration names, whenever one of these files has
changed. When the parent asks, it sends the web configuration and the settings file.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import TYPE_CHECKING, Any

from tcpexporter.config import files
from tcpexporter.errors import SettingsError, TcpExporterError
from tcpexporter.host import children, privileges

if TYPE_CHECKING:  # imported only when it is used, to save memory
    from tcpexporter.web.config import WebConfig

INTERVAL_S = 1.0
"""Seconds between two checks of the files.

Changed files are read when no file has changed for one interval. A certificate and its key
are two files, and some tools write a file in several steps.
"""

GRACE_S = 0.3
"""Seconds in which the child must end after its parent has closed the socket."""

WEB_CONFIG = "web configuration"
SETTINGS = "settings"
ANSWERED = "answered"
"""The subjects of the child's messages; the last one ends the answer to a request."""

_LENGTH = struct.Struct("!I")
_ASKING = b"?"

Parse = Callable[[str, str, Callable[[str], str]], "WebConfig"]

_Stat = tuple[int, ...] | None
"""Device, inode, size and times of a file; None: the file cannot be opened."""


class ReaderGoneError(Exception):
    """The child process has ended, so no file is read any more."""


@dataclass(frozen=True)
class Message:
    """The child's result of reading one subject: content, or an error."""

    about: str
    content: object = None
    """The content: for the web configuration, the argument of `WebConfig.from_json`; for
    the settings, the text of their file."""
    refused: str | None = None
    """The reason why there is no content; None: there is content."""
    setting: str | None = None
    """As in `SettingsError`."""

    def accepted(self) -> Any:
        """Return the content.

        Raises:
            SettingsError: a file cannot be read, or its content cannot be used.
        """
        if self.refused:
            raise SettingsError(self.refused, setting=self.setting)
        return self.content


class Reader:
    """The parent's handle of the child process that reads files."""

    def __init__(
        self,
        account: struct_passwd | None,
        *,
        web_config: str | None = None,
        settings: str | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Start the child process.

        Args:
            account: as in `privileges.keep_reading`.
            web_config: the path of the web configuration, which the child sends at once.
            settings: the path of the settings file, which the child sends when asked.
            interval_s: seconds between two checks of the watched files.

        Raises:
            SettingsError: a path is relative, and the current directory was deleted.
        """
        self._next_length: int | None = None
        """The length of the next message, in bytes; None: it has not been received yet."""
        self._socket, theirs = socket.socketpair()
        user = account.pw_name if account else ""
        with theirs:
            self._child = children.start(
                "tcpexporter.config.reader",
                theirs,
                str(interval_s),
                user,
                *map(_absolute, (web_config, settings)),
            )

    @property
    def process(self) -> int:
        """The process id."""
        return self._child.pid

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a message arrives."""
        return self._socket.fileno()

    def ask(self) -> None:
        """Make the child read all files now and send them; the last message is `ANSWERED`.

        Raises:
            ReaderGoneError: the child has ended.
        """
        try:
            self._socket.sendall(_ASKING)
        except OSError as error:
            raise ReaderGoneError from error

    def receive(self) -> Message:
        """Wait for the next message, and return it.

        Raises:
            ReaderGoneError: the child has ended.
        """
        if self._next_length is None:
            (self._next_length,) = _LENGTH.unpack(self._receive_bytes(_LENGTH.size))
        # If there is no memory for the message now, the length is kept for the next
        # attempt.
        message = self._receive_bytes(self._next_length)
        self._next_length = None
        return Message(**json.loads(message))

    def close(self) -> None:
        """Close the socket, so that the child ends; kill the child if it hangs."""
        # The child may have ended, and another thread may have closed the socket.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):  # the child is root, and we are not
                self._child.kill()
                self._child.wait()

    def _receive_bytes(self, length: int) -> bytes:
        try:
            received = self._socket.recv(length, socket.MSG_WAITALL)
        except OSError as error:
            raise ReaderGoneError from error
        if len(received) < length:
            raise ReaderGoneError
        return received


def _absolute(path: str | None) -> str:
    """Return the absolute path, for a child in another directory; empty for None.

    Raises:
        SettingsError: the path is relative, and the current directory was deleted.
    """
    try:
        return str(Path(path).absolute()) if path else ""
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be found from the current directory ({error.strerror}): use an"
            " absolute path"
        ) from error


class _Files:
    """Reads files, and detects whether they have changed since they were read."""

    def __init__(self) -> None:
        self.stats: dict[str, _Stat] = {}

    def changed(self) -> bool:
        return self.stats != {path: _stat(path) for path in self.stats}

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            SettingsError: the file cannot be read.
        """
        self.stats[path] = None
        try:
            with files.open_file(path, wait=False) as file:
                self.stats[path] = _as_stat(os.fstat(file.fileno()))
                return files.read_all(file, only_regular=True)
        except (OSError, ValueError, SettingsError) as error:
            raise SettingsError(f"{path} cannot be read: {files.reason(error)}") from error

    def read_text(self, path: str) -> str:
        """Return the text of a file; bytes that are not UTF-8 become surrogates.

        Raises:
            SettingsError: the file cannot be read.
        """
        return self.read(path).decode(errors="surrogateescape")


def _stat(path: str) -> _Stat:
    try:
        return _as_stat(Path(path).stat())
    except (OSError, ValueError):
        return None


def _as_stat(status: os.stat_result) -> _Stat:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _read_as(about: str, read: Callable[[], object]) -> Message:
    try:
        return Message(about, read())
    except SettingsError as error:
        return Message(about, refused=str(error), setting=error.setting)


def _web_config(path: str, files: _Files, parse: Parse) -> dict[str, object]:
    directory = Path(path).parent
    try:
        text = files.read_text(path)
    except SettingsError as error:
        raise SettingsError(str(error), setting="web-config") from error
    config = parse(text, path, lambda name: files.read_text(str(directory / name)))
    return asdict(config)


def _settings(path: str) -> str:
    try:
        return _Files().read(path).decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


class _Watch:
    """Sends changed files to the parent, until the parent has ended."""

    def __init__(
        self,
        parent: socket.socket,
        *,
        web_config: str,
        settings: str,
        interval_s: float,
        parse: Parse | None,
    ) -> None:
        self._parent = parent
        self._web_config = web_config
        self._settings = settings
        self._interval_ms = interval_s * 1000
        self._parse = parse
        self._asking = select.poll()
        self._asking.register(parent, select.POLLIN)

    def run(self) -> None:
        """Run until the parent has ended; then raise EOFError."""
        is_asked = False
        known: Message | None = None
        while True:
            files = _Files()
            if parse := self._parse:
                found = _read_as(
                    WEB_CONFIG,
                    lambda: _web_config(self._web_config, files, parse),  # noqa: B023
                )
                if found != known or is_asked:
                    self._send(found)
                known = found
            if is_asked:
                if self._settings:
                    self._send(_read_as(SETTINGS, lambda: _settings(self._settings)))
                self._send(Message(ANSWERED))
            is_asked = self._is_asked_before_change(files)

    def _is_asked_before_change(self, files: _Files) -> bool:
        while not files.changed():
            if self._is_asked(self._interval_ms if files.stats else None):
                return True
        stats = None
        while stats != (stats := {each: _stat(each) for each in files.stats}):
            if self._is_asked(self._interval_ms):
                return True
        return False

    def _is_asked(self, timeout_ms: float | None) -> bool:
        if not self._asking.poll(timeout_ms):
            return False
        if not self._parent.recv(len(_ASKING)):
            raise EOFError
        return True

    def _send(self, message: Message) -> None:
        content = json.dumps(asdict(message)).encode()
        self._parent.sendall(_LENGTH.pack(len(content)) + content)


def _main(
    descriptor: str, interval_s: str, user: str, web_config: str, settings: str
) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # only the parent handles these
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as parent:
        parse = _parser() if web_config else None
        try:
            privileges.keep_reading(privileges.find_user(user) if user else None)
        except TcpExporterError as error:
            sys.exit(f"tcpexporter: the reader of configuration files ends: {error}")
        with contextlib.suppress(ConnectionError, EOFError):
            _Watch(
                parent,
                web_config=web_config,
                settings=settings,
                interval_s=float(interval_s),
                parse=parse,
            ).run()


def _parser() -> Parse:
    from tcpexporter.web.config_file import parse  # noqa: PLC0415  # it uses 2 MiB, in the child only

    return parse


if __name__ == "__main__":
    _main(*sys.argv[1:])
