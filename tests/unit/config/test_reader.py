# SPDX-License-Identifier: GPL-3.0-only
"""When files are read again: each look is a step of the test, no time passes."""

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
    """In place of its socket: what it was sent."""

    def __init__(self) -> None:
        self.sent: list[reader.Message] = []
        self.asks = 0

    def sendall(self, message: bytes) -> None:
        self.sent.append(reader.Message(**json.loads(message[reader._LENGTH.size :])))

    def recv(self, _most: int) -> bytes:
        """What it asks, if it does; when there is nothing it is gone."""
        if not self.asks:
            return b""
        self.asks -= 1
        return b"?"


class Looks:
    """In place of a poll: does the next step; after the last one the parent is gone."""

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
    """A step: the parent asks."""


def watch(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *steps: Step, settings: str = ""
) -> tuple[list[tuple[str, str]], Parent]:
    """What was read of a pair of files while the steps were taken, and what was sent."""
    read_pairs = []

    def parse(_text: str, _path: str, read: Callable[[str], str]) -> WebConfig:
        pair = read("cert"), read("key")
        read_pairs.append(pair)
        return WebConfig(headers={"pair": " ".join(pair)})

    (directory / "web.yml").write_text("")
    parent = Parent()
    monkeypatch.setattr(
        "tcpexporter.config.reader.select.poll", lambda: Looks(parent, *steps)
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


def test_a_pair_is_read_when_both_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not between the two, nor what is half written."""
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


def test_what_reads_the_same_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that was only touched is nothing new."""
    for name in ("cert", "key"):
        (tmp_path / name).write_text("1")
    touch = lambda: os.utime(tmp_path / "key", (1, 1))  # noqa: E731
    pairs, parent = watch(monkeypatch, tmp_path, touch, nothing, nothing)
    assert pairs == [("1", "1")] * 2
    assert len(parent.sent) == 1


def test_a_file_that_comes_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is missing is watched for."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_text("1")
    pairs, parent = watch(
        monkeypatch, tmp_path, lambda: key.write_text("1"), nothing, nothing
    )
    assert pairs == [("1", "1")]
    assert [each.content is None for each in parent.sent] == [True, False]
    assert "key cannot be read" in str(parent.sent[0].refused)


def test_when_asked_it_tells_of_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Changed or not, readable or not, and then that this was all, as often as asked."""
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
    web, *told = parent.sent
    assert told == [
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


def test_a_pair_half_replaced_is_read_when_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And again when it is whole."""
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


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to, and a file that never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(SettingsError, match="it is not a regular file"):
            reader._Files().read(path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """No certificate has a mebibyte."""
    (tmp_path / "large").write_bytes(bytes(files.LARGEST_BYTES + 1))
    with pytest.raises(SettingsError, match="is larger than"):
        reader._Files().read(str(tmp_path / "large"))
