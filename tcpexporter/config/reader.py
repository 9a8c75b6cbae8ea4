# SPDX-License-Identifier: GPL-3.0-only
"""Reads the files that can change, in a child that goes on reading.

A key is readable by root alone, as a rule, and whoever serves is root no more when the
key is replaced; it cannot open any file by then. So a child that no client can talk to
keeps what it takes to read, and nothing else, for as long as its parent lives. It sends
all that the web configuration and the files it names have to say whenever that has
changed, and that and the file of settings when it is asked.
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

if TYPE_CHECKING:  # what is not asked for takes no memory
    from tcpexporter.web.config import WebConfig

INTERVAL_S = 1.0
"""Between two looks at the files. What has changed is read when it has not for so long:
a certificate and its key are two files, and some write them piece by piece."""

GRACE_S = 0.3
"""What the child gets to see that nobody listens any more."""

WEB_CONFIG = "web configuration"
SETTINGS = "settings"
ANSWERED = "answered"
"""What the child can tell about; the last one, that all is told that was asked for."""

_LENGTH = struct.Struct("!I")
_ASKING = b"?"

Parse = Callable[[str, str, Callable[[str], str]], "WebConfig"]

_Look = tuple[int, ...] | None
"""What a file looks like from outside; None: not there."""


class ReaderGoneError(Exception):
    """The child has ended, so changes are not read any more."""


@dataclass(frozen=True)
class Told:
    """What the child says of one of its files."""

    about: str
    content: object = None
    """Of the web configuration what `WebConfig.from_json` takes, of the settings their
    text."""
    refused: str | None = None

    def accepted(self) -> Any:
        """The content.

        Raises:
            SettingsError: it cannot be used, or not be read.
        """
        if self.refused:
            raise SettingsError(self.refused)
        return self.content


class Reader:
    """The child, as its parent has it."""

    def __init__(
        self,
        account: struct_passwd | None,
        *,
        web_config: str | None = None,
        settings: str | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Start it.

        Args:
            account: Whom it becomes, as `privileges.keep_reading` has it.
            web_config: The path of the web configuration, which is told of at once.
            settings: The path of the file of settings, which is told of when asked for.
            interval_s: Between two looks at what is watched.

        Raises:
            SettingsError: a path is relative to a directory that was deleted.
        """
        self._coming: int | None = None
        """The length of what comes next, if that was received already."""
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
        """Its process id."""
        return self._child.pid

    def fileno(self) -> int:
        """Can be read from when it has something to tell."""
        return self._socket.fileno()

    def ask(self) -> None:
        """Have it read everything now, changed or not, and tell: `ANSWERED` is the last.

        Raises:
            ReaderGoneError: nothing will come any more.
        """
        try:
            self._socket.sendall(_ASKING)
        except OSError as error:
            raise ReaderGoneError from error

    def receive(self) -> Told:
        """Wait for what it tells next.

        Raises:
            ReaderGoneError: nothing will come any more.
        """
        if self._coming is None:
            (self._coming,) = _LENGTH.unpack(self._take(_LENGTH.size))
        message = self._take(self._coming)  # for which there may be no memory now
        self._coming = None
        return Told(**json.loads(message))

    def close(self) -> None:
        """End it, which it does by itself when nobody listens, unless it hangs."""
        # It may have ended, and this be closed by who follows it, too.
        with contextlib.suppress(OSError):
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


def _absolute(path: str | None) -> str:
    """The path for a child in another directory; empty where there is none.

    Raises:
        SettingsError: it is relative to a directory that was deleted.
    """
    try:
        return str(Path(path).absolute()) if path else ""
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be found from the current directory ({error.strerror}): name it"
            " by a path from the root directory"
        ) from error


class _Files:
    """What has been read, and what it looked like."""

    def __init__(self) -> None:
        self.looks: dict[str, _Look] = {}

    def changed(self) -> bool:
        return self.looks != {path: _look(path) for path in self.looks}

    def read(self, path: str) -> bytes:
        """The content of a file.

        Raises:
            SettingsError: it cannot be had.
        """
        self.looks[path] = None
        try:
            with files.open_file(path, wait=False) as file:
                self.looks[path] = _as_look(os.fstat(file.fileno()))
                return files.read_all(file, only_regular=True)
        except (OSError, ValueError, SettingsError) as error:
            raise SettingsError(f"{path} cannot be read: {files.reason(error)}") from error

    def read_text(self, path: str) -> str:
        """The text of a file, whatever bytes it has.

        Raises:
            SettingsError: it cannot be had.
        """
        return self.read(path).decode(errors="surrogateescape")


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


def _tell(about: str, read: Callable[[], object]) -> Told:
    try:
        return Told(about, read())
    except SettingsError as error:
        return Told(about, refused=str(error))


def _web_config(path: str, files: _Files, parse: Parse) -> dict[str, object]:
    directory = Path(path).parent
    text = files.read_text(path)
    config = parse(text, path, lambda name: files.read_text(str(directory / name)))
    return asdict(config)


def _settings(path: str) -> str:
    try:
        return _Files().read(path).decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


class _Watch:
    """Tells the parent what is read, until it is gone."""

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
        """Raises EOFError when the parent is gone."""
        is_asked = False
        known: Told | None = None
        while True:
            files = _Files()
            if parse := self._parse:
                found = _tell(
                    WEB_CONFIG,
                    lambda: _web_config(self._web_config, files, parse),  # noqa: B023
                )
                if found != known or is_asked:
                    self._send(found)
                known = found
            if is_asked:
                if self._settings:
                    self._send(_tell(SETTINGS, lambda: _settings(self._settings)))
                self._send(Told(ANSWERED))
            is_asked = self._is_asked_before_change(files)

    def _is_asked_before_change(self, files: _Files) -> bool:
        while not files.changed():
            if self._is_asked(self._interval_ms if files.looks else None):
                return True
        looks = None
        while looks != (looks := {each: _look(each) for each in files.looks}):
            if self._is_asked(self._interval_ms):
                return True
        return False

    def _is_asked(self, timeout_ms: float | None) -> bool:
        if not self._asking.poll(timeout_ms):
            return False
        if not self._parent.recv(len(_ASKING)):
            raise EOFError
        return True

    def _send(self, told: Told) -> None:
        message = json.dumps(asdict(told)).encode()
        self._parent.sendall(_LENGTH.pack(len(message)) + message)


def _main(
    descriptor: str, interval_s: str, user: str, web_config: str, settings: str
) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # its parent's to answer
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
    from tcpexporter.web.config_file import parse  # noqa: PLC0415  # not for the parent: 2 MiB

    return parse


if __name__ == "__main__":
    _main(*sys.argv[1:])
