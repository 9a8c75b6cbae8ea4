# SPDX-License-Identifier: GPL-3.0-only
"""What the child that loads the program can send its parent; what is made of a refusal."""

import errno
import os
import re
import resource
import socket
import sys
from dataclasses import astuple, fields
from pathlib import Path

import pytest

from tcpexporter.ebpf import loader
from tcpexporter.ebpf.loader import LOADED, MESSAGE_BYTES, Descriptors, Request
from tcpexporter.errors import LoadError

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
    ("number", "said"),
    [
        (errno.EPERM, "BCC cannot .* 64 KiB are allowed: LimitMEMLOCK"),
        (errno.ENOMEM, "^out of memory while compiling; needs about 68 MiB"),
        (None, "^BCC cannot compile the BPF program \\(no\\), .* it said$"),
    ],
)
def test_the_limit_that_keeps_the_largest_map_from_being_made_is_named(
    number: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BCC blames compilation; the errno of the same map says what it was.

    Of locked memory before Linux 5.11, of a memory cgroup since.
    """

    def create_map(_kind: int, _key: int, _value: int, *, entries: int) -> int:
        assert entries == 1009
        if number:
            raise OSError(number, os.strerror(number))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(loader, "create_map", create_map)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert re.search(said, loader._why_not_compiled(Exception("no"), 1009))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -9 $$", "died (SIGKILL)"),
        ("kill -6 $$", "died (SIGABRT)"),
        ("exit 3", "code 3"),
    ],
)
def test_how_a_silent_loader_ended_is_reported(
    ending: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child process that ends without a message: its signal or exit code."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ending}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LoadError, match=re.escape(said)):
        loader.load(Request(1009, 0, (0, 0)))


def test_a_loader_killed_for_memory_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the kernel's counter of such kills grows, with the memory it needs."""
    vmstat, python = tmp_path / "vmstat", tmp_path / "python"
    vmstat.write_text("pgfault 7\noom_kill 2\n")
    python.write_text(f"#!/bin/sh\necho oom_kill 3 >{vmstat}\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(loader, "VMSTAT", vmstat)
    with pytest.raises(
        LoadError, match="out of memory while compiling; needs about 89 MiB"
    ):
        loader.load(Request(262144, 0, (0, 0)))


def test_a_loader_that_cannot_be_started_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sentence, and without a descriptor that stays open."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    before = open_descriptors()
    with pytest.raises(LoadError, match="cannot be started: No such file"):
        loader.load(Request(1009, 0, (0, 0)))
    assert open_descriptors() == before


def test_too_few_descriptors_are_reported() -> None:
    """The kernel drops those of a message that the process may not open."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        socket.send_fds(theirs, [LOADED], [theirs.fileno()] * ALL)
        before = open_descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(LoadError, match="LimitNOFILE"):
                loader._receive(ours)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_descriptors() == before
