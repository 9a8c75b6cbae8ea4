# SPDX-License-Identifier: GPL-3.0-only
"""Helpers to open and close sockets in unusual ways: links, filters, TCP_REPAIR."""

import contextlib
import ctypes
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests.support import new_netns

SYN_SENT, SYN_RECV = 2, 3
"""TCP states: include/net/tcp_states.h."""

DEVICE = "odd"
HARDWARE_ADDRESSES = ("02:00:00:00:00:02", "02:00:00:00:00:03")

TCPI_OPT_SYN_DATA = 32  # this and TCP_REPAIR: include/uapi/linux/tcp.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_QUEUES = (1, 2)

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27

SPARE_DESCRIPTORS = 97


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def linked_netns(device: str = DEVICE) -> Iterator[str]:
    """Create a link to a new network namespace, and yield the name of the namespace.

    The device in that namespace is named `DEVICE`. Neither end has an IPv4 address.
    """
    here, there = HARDWARE_ADDRESSES
    with new_netns() as other:
        ip(
            *("link", "add", device, "address", here, "type", "veth"),
            *("peer", "name", DEVICE, "address", there, "netns", other),
        )
        ip("link", "set", device, "up")
        ip("-n", other, "link", "set", DEVICE, "up")
        try:
            yield other
        finally:
            # Otherwise the kernel would delete it some time after the namespace.
            ip("link", "delete", device)


def tcp_state(opened: socket.socket) -> int:
    """Return the first byte of ``struct tcp_info``: tcp(7)."""
    return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def syn_had_data(connected: socket.socket) -> bool:
    """Return whether the SYN carried data that was acknowledged or received."""
    options = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 6)[5]
    return bool(options & TCPI_OPT_SYN_DATA)


class _FilterProgram(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


@contextlib.contextmanager
def dropping_packets(opened: socket.socket) -> Iterator[None]:
    """Drop all packets for a socket, with the one-instruction filter ``ret 0``."""
    drop = ctypes.create_string_buffer(b"\x06\0\0\0\0\0\0\0", 8)
    program = _FilterProgram(1, ctypes.addressof(drop))
    opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))
    try:
        yield
    finally:
        opened.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def close_in_repair(connected: socket.socket) -> dict[int, int]:
    """Close a connection without sending a packet, as migration to another host does.

    Returns:
        The sequence number of each queue, which `connect_in_repair` requires.
    """
    connected.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    numbers = {}
    for queue in TCP_REPAIR_QUEUES:
        connected.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        numbers[queue] = connected.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
    connected.close()
    return numbers


def connect_in_repair(
    local: tuple[str, int], remote: tuple[str, int], numbers: dict[int, int]
) -> socket.socket:
    """Open one end of a connection without a handshake; the other end must exist."""
    made = socket.socket()
    made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    made.bind(local)
    for queue, number in numbers.items():
        made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        made.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, number)
    made.connect(remote)
    made.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    return made


@contextlib.contextmanager
def held_by_child(inherited: socket.socket) -> Iterator[None]:
    """Keep a socket open in a child process until the end of the block."""
    # cat ends when Popen closes its standard input.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[inherited.fileno()]):
        yield


@contextlib.contextmanager
def listening(address: str, ports: Sequence[int]) -> Iterator[None]:
    """Listen at each port, in as many processes as the limit of open files requires.

    The processes end when their standard input is closed, so they end with their parent.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as holders:
        processes = []
        for first in range(0, len(ports), most - SPARE_DESCRIPTORS):
            process = holders.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, address],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            share = ports[first : first + most - SPARE_DESCRIPTORS]
            assert process.stdin is not None
            process.stdin.write(" ".join(map(str, share)) + "\n")
            process.stdin.flush()
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
        yield


def _listen(address: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ports = map(int, sys.stdin.readline().split())
    listeners = [socket.create_server((address, port), backlog=1) for port in ports]
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    sys.stdin.read()
    for each in listeners:
        each.close()


if __name__ == "__main__":
    _listen(sys.argv[1])
