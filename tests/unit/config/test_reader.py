# SPDX-License-Identifier: GPL-3.0-only
"""The reader process reads files again when they have changed.

Each poll of the reader executes a step of a test, so that no test waits.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tcpexporter.config import files, reader
from tcpexporter.errors import SettingsError
from tcpexporter.web.config import WebConfig

Step = Callable[[], object]


class Parent:
    """Replaces the socket to the parent process: it records messages and sends requests."""

    def __init__(self) -> None:
        self.sent: list[reader.Message] = []
        self.asks = 0

    def sendall(self, message: bytes) -> None:
        self.sent.append(reader.Message(**json.loads(message[reader._LENGTH.size :])))

    def recv(self, _most: int) -> bytes:
        """Return a request if one is due; otherwise b"", as if the parent process had
        ended."""
        if not self.asks:
            return b""
        self.asks -= 1
        return b"?"


class Poll:
    """Replaces `select.poll`: each poll executes a step; after the last the parent has
    ended."""

    def __init__(self, parent: Parent, *steps: Step) -> None:
        self._parent = parent
        self._steps = iter(steps)

    def register(self, *_: object) -> None:
        pass

    def poll(self, _ms: float) -> bool:
        step = next(self._steps, None)
        if step is asks:
            self._parent.asks += 1
        elif step:
            step()
        return step in (None, asks)


def asks() -> None:
    """Mark a step in which the parent process sends a request."""


def watch(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *steps: Step, settings: str = ""
) -> tuple[list[tuple[str, str]], Parent]:
    """Execute the steps; return the pairs of file contents that were read, and the
    messages."""
    read_pairs = []

    def parse(_text: str, _path: str, read: Callable[[str], str]) -> WebConfig:
        pair = read("cert"), read("key")
        read_pairs.append(pair)
        return WebConfig(headers={"pair": " ".join(pair)})

    (directory / "web.yml").write_text("")
    parent = Parent()
    monkeypatch.setattr(
        "tcpexporter.config.reader.select.poll", lambda: Poll(parent, *steps)
    )
    watching = reader._Watch(
        cast("socket.socket", parent),
        web_config=str(directory / "web.yml"),
        settings=settings,
        interval_s=1.0,
        parse=parse,
    )
    with contextlib.suppress(EOFError):
        watching.run()
    return read_pairs, parent


def nothing() -> None:
    pass


def test_a_pair_of_files_is_read_when_both_have_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is not read between the two writes, nor while one file is incomplete."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("1")
    key.write_text("1")
    pairs, parent = watch(
        monkeypatch,
        tmp_path,
        nothing,
        lambda: cert.write_text("2"),
        lambda: key.write_text("22"),
        lambda: key.write_text("222"),
        lambda: cert.write_text("222"),
        nothing,
        nothing,
    )
    assert pairs == [("1", "1"), ("222", "222")]
    assert len(parent.sent) == 2


def test_unchanged_content_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the modification time of the file has changed."""
    for name in ("cert", "key"):
        (tmp_path / name).write_text("1")
    touch = lambda: os.utime(tmp_path / "key", (1, 1))  # noqa: E731
    pairs, parent = watch(monkeypatch, tmp_path, touch, nothing, nothing)
    assert pairs == [("1", "1")] * 2
    assert len(parent.sent) == 1


def test_a_file_created_later_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first message says that the file is missing, the second one has its content."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("1")
    pairs, parent = watch(
        monkeypatch, tmp_path, lambda: key.write_text("1"), nothing, nothing
    )
    assert pairs == [("1", "1")]
    assert [each.content is None for each in parent.sent] == [True, False]
    assert "key cannot be read" in str(parent.sent[0].refused)


def test_a_request_is_answered_with_all_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each answer has changed, unchanged and unreadable files, and ends with `ANSWERED`."""
    for name in ("cert", "key"):
        (tmp_path / name).write_text("1")
    conf = tmp_path / "conf"
    steps = (
        asks,
        nothing,
        lambda: conf.write_text("port 443\n"),
        asks,
        lambda: conf.write_bytes(b"port \xff\n"),
        asks,
    )
    pairs, parent = watch(monkeypatch, tmp_path, *steps, settings=str(conf))
    assert pairs == [("1", "1")] * 4
    web, *following = parent.sent
    assert following == [
        web,
        reader.Message(
            "settings", refused=f"{conf} cannot be read: No such file or directory"
        ),
        reader.Message("answered"),
        web,
        reader.Message("settings", "port 443\n"),
        reader.Message("answered"),
        web,
        reader.Message(
            "settings",
            refused=f"{conf} cannot be read: 'utf-8' codec can't decode byte 0xff in"
            " position 5: invalid start byte",
        ),
        reader.Message("answered"),
    ]


def test_a_half_replaced_pair_is_read_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The pair is read again when the second file has changed too."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("1")
    key.write_text("1")
    pairs, _ = watch(
        monkeypatch,
        tmp_path,
        lambda: cert.write_text("2"),
        asks,
        lambda: key.write_text("22"),
        nothing,
        nothing,
    )
    assert pairs == [("1", "1"), ("2", "1"), ("2", "22")]


def test_a_file_that_is_not_regular_is_refused_at_once(tmp_path: Path) -> None:
    """Neither a pipe without a writer nor an endless device blocks the reader."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(SettingsError, match="it is not a regular file"):
            reader._Files().read(path)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """The limit is 1 MiB; certificates are much smaller."""
    (tmp_path / "large").write_bytes(bytes(files.LARGEST_BYTES + 1))
    with pytest.raises(SettingsError, match="is larger than"):
        reader._Files().read(str(tmp_path / "large"))
