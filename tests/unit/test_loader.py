# SPDX-License-Identifier: GPL-3.0-only
"""What the child that loads the program can send its parent; what is made of a refusal."""

import errno
import os
import resource
import socket
from dataclasses import astuple, fields

import pytest

from tcpexporter import loader
from tcpexporter.errors import LoadError
from tcpexporter.loader import LOADED, MESSAGE_BYTES, Descriptors

ALL = len(fields(Descriptors))


def receive(message: bytes, descriptors: int) -> Descriptors:
    """What the parent makes of a message with that many descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(theirs, [message], [theirs.fileno()] * descriptors)
        theirs.shutdown(socket.SHUT_WR)
        return loader._receive(ours)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  only the names


def test_all_descriptors_are_taken() -> None:
    """In the order of their names, and closed with them."""
    before = open_descriptors()
    received = receive(LOADED, ALL)
    assert len(set(astuple(received))) == ALL
    received.close()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("message", "descriptors", "sentence"),
    [
        (LOADED, ALL - 1, f"sent {ALL - 1} descriptors"),
        (LOADED, ALL + 1, None),  # what there is no room for the kernel closes
        (LOADED, 1, "sent 1 descriptors"),
        (LOADED, 0, "sent 0 descriptors"),
        (b"load", ALL, f"sent {ALL} descriptors"),
        (b"", ALL, f"sent {ALL} descriptors"),
        (b"", 0, "died"),
        (b" \n", 0, "died"),
        (b"the kernel refuses it", 0, "^the kernel refuses it$"),
        (b"\xff\xfe" * 7, 0, "\ufffd" * 7),
        (b"x" * (MESSAGE_BYTES + 7), 0, "x" * MESSAGE_BYTES),
    ],
)
def test_what_is_wrong_is_told_of(
    message: bytes, descriptors: int, sentence: str | None
) -> None:
    """In a sentence, and no descriptor is left open."""
    before = open_descriptors()
    if sentence is None:
        receive(message, descriptors).close()
    else:
        with pytest.raises(LoadError, match=sentence):
            receive(message, descriptors)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("number", "has_hint"), [(errno.EPERM, True), (errno.ENOMEM, False), (None, False)]
)
def test_a_limit_of_locked_memory_is_named(
    number: int | None, monkeypatch: pytest.MonkeyPatch, *, has_hint: bool
) -> None:
    """Where a map as large as the largest is refused so, as by kernels before 5.11."""

    def create_map(_kind: int, _key: int, _value: int, *, entries: int) -> int:
        assert entries == 1009
        if number:
            raise OSError(number, os.strerror(number))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(loader, "create_map", create_map)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    hint = loader._locked_memory_hint(1009)
    assert ("64 KiB" in hint and "LimitMEMLOCK" in hint) == has_hint
    assert bool(hint) == has_hint
