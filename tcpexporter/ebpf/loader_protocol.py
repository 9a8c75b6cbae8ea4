# SPDX-License-Identifier: GPL-3.0-only
"""The messages between the exporter and the loader process, over one socket.

The exporter sends a `Request`. The loader answers with `Descriptors`, or with one sentence
that says why it cannot load the BPF program.
"""

import json
import os
import resource
import socket
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields

from tcpexporter.errors import LoadError

LOAD_TIMEOUT_S = 60
MESSAGE_BYTES = 65536
"""The maximum length of a message, in bytes; the kernel truncates longer messages."""

LOADED = b"loaded"
"""The text of the message that carries the descriptors."""

MAX_SERIES = 65536

COMPILING_BYTES = 76 << 20
"""Memory that compiling the program requires of the limit of a cgroup, without the slots.

Measured with Linux 6.18, BCC 0.26 and LLVM 14: 70 MiB with slots for 1,009 connections, 94
for 262,144, 266 for 2,000,000; 80 for 1,009 with histograms of 8 bounds, on x86-64.
On arm64 the start fails with 72 MiB and succeeds with 76, with pages of 4 or 16 KiB.
"""

CONNECTION_BYTES = 102
"""Memory that the maps require for each of --max-connections, in bytes."""

BUCKET_BYTES = 16
"""Memory for a bucket or a sum of lifetimes, in bytes for each series number.

The ledger and its corrections each require half of it."""

SEE_DEBUG = "--log-level debug shows its output"


@dataclass(frozen=True)
class Request:
    """The exporter's request to load the BPF program."""

    max_connections: int
    """The number of connection slots."""
    netns: int
    """Inode of the only network namespace to observe; 0: all."""
    secret: tuple[int, int]
    """The key of `identity.hashes`, as two numbers of 64 bits."""
    max_series: int = MAX_SERIES
    """The maximum number of series numbers."""
    outbound_port: int = 0
    """Which port is part of the series of an outbound connection: an `OutboundPort`."""
    by_netns: bool = False
    """Whether namespaces are counted separately."""
    by_cgroup: bool = False
    """Whether cgroups are counted separately, if the kernel has those of sockets."""
    own_listener: tuple[int, int] = (0, 0)
    """Namespace and port of the exporter's own listener; port 0: it has none."""
    client_masks: tuple[tuple[int, int], tuple[int, int]] | None = None
    """Which bits of an IPv4 and IPv6 address identify a client; None: clients are
    not counted."""
    lifetime_bounds: tuple[int, ...] = ()
    """The upper bounds of lifetime buckets, in units of 2^13 ns; empty: no histogram."""
    lose_one_in: int = 0
    """For tests: the program ignores one in this number of events, at random; 0: none."""
    without: tuple[str, ...] = ()
    """For tests: the names of features to treat as missing."""


@dataclass(frozen=True)
class Descriptors:
    """File descriptors of the loaded program, of its attachment and of its maps.

    The kernel keeps each object as long as a descriptor or a pin refers to it.
    """

    slots: int
    connections: int
    series_and_time: int
    clients: int
    free_slots: int
    series_numbers: int
    ledger: int
    corrections: int
    free_series: int
    epochs: int
    recording: int
    closings: int
    events: int
    barrier: int
    program: int
    link: int
    """The attachment to the tracepoint."""

    def close(self) -> None:
        """Detach the program and free its maps, unless they are pinned."""
        _close(astuple(self))


class SilentError(LoadError):
    """The loader has ended without a message."""


def send_request(channel: socket.socket, request: Request) -> None:
    """Send a request to the loader.

    The request has a secret. So it is a message: every user of the host could read the
    arguments of a process.

    Raises:
        ConnectionError: the loader has ended.
    """
    channel.send(json.dumps(asdict(request)).encode())


def receive_request(channel: socket.socket) -> Request:
    """Return the exporter's request."""
    fields = json.loads(channel.recv(MESSAGE_BYTES))
    return Request(**fields)


def send_descriptors(channel: socket.socket, descriptors: Descriptors) -> None:
    """Send copies of all descriptors to the exporter."""
    socket.send_fds(channel, [LOADED], list(astuple(descriptors)))


def send_reason(channel: socket.socket, sentence: str) -> None:
    """Send the sentence that says why the program was not loaded."""
    channel.send(sentence.encode())


def out_of_memory(request: Request) -> str:
    """Return the sentence for a loader that has run out of memory."""
    needed = COMPILING_BYTES + request.max_connections * CONNECTION_BYTES
    if request.lifetime_bounds:
        needed += request.max_series * BUCKET_BYTES * (len(request.lifetime_bounds) + 2)
    return (
        f"out of memory while compiling; the exporter requires about {needed >> 20} MiB:"
        " raise the memory limit of the service or container, or lower --max-connections"
    )


def receive_descriptors(channel: socket.socket) -> Descriptors:
    """Receive the loader's descriptors; the caller must close them.

    Raises:
        SilentError: the loader has ended without a message.
        LoadError: the loader sent a sentence; or its answer is incomplete or too late.
    """
    try:
        message, descriptors, flags, _ = socket.recv_fds(
            channel, MESSAGE_BYTES, len(fields(Descriptors)), socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise LoadError(
            f"the BPF program was not loaded within {LOAD_TIMEOUT_S} s, {SEE_DEBUG}: give"
            " the exporter more CPU, or use --source sock_diag"
        ) from None
    except ConnectionError:  # the loader ended before it read the request
        message, descriptors, flags = b"", [], 0
    if flags & socket.MSG_CTRUNC and len(descriptors) < len(fields(Descriptors)):
        _close(descriptors)
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise LoadError(
            f"the maps of the BPF program exceed the limit of {most} open files: raise"
            " LimitNOFILE in the unit, or ulimit -n"
        )
    return _checked(message, descriptors)


def _checked(message: bytes, received: list[int]) -> Descriptors:
    if message == LOADED and len(received) == len(fields(Descriptors)):
        return Descriptors(*received)
    _close(received)
    sentence = message.decode(errors="replace").strip()
    if received or message == LOADED:
        raise LoadError(
            f"the process that loads the BPF program sent {len(received)} descriptors,"
            f" {SEE_DEBUG}"
        )
    if not sentence:
        raise SilentError("the process that loads the BPF program died")
    raise LoadError(sentence)


def _close(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        os.close(each)
