# SPDX-License-Identifier: GPL-3.0-only
"""When files are read again: each look is a step of the test, no time passes."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tcpexporter import webreader
from tcpexporter.errors import WebConfigError
from tcpexporter.webconfig import WebConfig

Step = Callable[[], object]


class Parent:
    """In place of its socket: what it was sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, object]] = []

    def sendall(self, message: bytes) -> None:
        self.sent.append(json.loads(message[webreader._LENGTH.size :]))


class Looks:
    """In place of a poll: does the next step; after the last one the parent is gone."""

    def __init__(self, *steps: Step) -> None:
        self._steps = iter(steps)

    def register(self, *_: object) -> None:
        pass

    def poll(self, _ms: float) -> bool:
        step = next(self._steps, None)
        if step:
            step()
        return step is None


def watch(
    monkeypatch: pytest.MonkeyPatch, directory: Path, *steps: Step
) -> tuple[list[tuple[str, str]], Parent]:
    """What was read of a pair of files while the steps were taken, and what was sent."""
    read_pairs = []

    def parse(_text: str, _path: str, read: Callable[[str], str]) -> WebConfig:
        pair = read("cert"), read("key")
        read_pairs.append(pair)
        return WebConfig(headers={"pair": " ".join(pair)})

    (directory / "web.yml").write_text("")
    monkeypatch.setattr("tcpexporter.webreader.select.poll", lambda: Looks(*steps))
    parent = Parent()
    path = str(directory / "web.yml")
    webreader._watch(cast("socket.socket", parent), path, 1.0, parse)
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
    assert [list(each)[0] for each in parent.sent] == ["refused", "tls"]  # noqa: RUF015
    assert "key cannot be read" in str(parent.sent[0]["refused"])


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe that nobody writes to, and a file that never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(WebConfigError, match="is not a regular file"):
            webreader._Files().read(path)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """No certificate has a mebibyte."""
    (tmp_path / "large").write_bytes(bytes(webreader.LARGEST_BYTES + 1))
    with pytest.raises(WebConfigError, match="is larger than"):
        webreader._Files().read(str(tmp_path / "large"))
