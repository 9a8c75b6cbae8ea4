# SPDX-License-Identifier: GPL-3.0-only
"""The exporter receives complete, incomplete or malformed answers of the loader."""

import os
import resource
import socket
from dataclasses import astuple, fields

import pytest

from tcpexporter.ebpf.loader_protocol import (
    LOADED,
    MESSAGE_BYTES,
    Descriptors,
    receive_descriptors,
)
from tcpexporter.errors import LoadError

ALL = len(fields(Descriptors))


def receive(message: bytes, descriptors: int) -> Descriptors:
    """Send a message with this many descriptors; return what the exporter receives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(theirs, [message], [theirs.fileno()] * descriptors)
        theirs.shutdown(socket.SHUT_WR)
        return receive_descriptors(ours)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  only the names


def test_a_complete_answer_is_accepted() -> None:
    """The descriptors get their names, and `close` closes all of them."""
    before = open_descriptors()
    received = receive(LOADED, ALL)
    assert len(set(astuple(received))) == ALL
    received.close()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("message", "descriptors", "sentence"),
    [
        (LOADED, ALL - 1, f"sent {ALL - 1} descriptors"),
        (LOADED, ALL + 1, None),  # the kernel closes the last one
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
def test_a_wrong_answer_is_an_error(
    message: bytes, descriptors: int, sentence: str | None
) -> None:
    """The error is one sentence, and no descriptor stays open."""
    before = open_descriptors()
    if sentence is None:
        receive(message, descriptors).close()
    else:
        with pytest.raises(LoadError, match=sentence):
            receive(message, descriptors)
    assert open_descriptors() == before


def test_too_few_descriptors_are_reported() -> None:
    """The kernel drops descriptors that exceed the limit of open files."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        socket.send_fds(theirs, [LOADED], [theirs.fileno()] * ALL)
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(LoadError, match="LimitNOFILE"):
                receive_descriptors(ours)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_descriptors() == before
