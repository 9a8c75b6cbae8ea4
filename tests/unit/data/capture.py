# SPDX-License-Identifier: GPL-3.0-only
"""Captures socket tables to files in its directory: python -m tests.unit.data.capture.

It requires root. It opens the sockets of ``_open_sockets`` in a new network namespace, and
reads them from the kernel. The files were captured on x86-64 (words are little-endian):

- ``diag-inet*.bin``, ``diag-inet6*.bin``: one datagram each of a sock_diag
  dump with sequence number 7, of all states;
- ``diag-error.bin``: the answer for an address family that has no sock_diag;
- ``proc-net-tcp.txt``, ``proc-net-tcp6.txt``: the files of these names.
"""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from pyroute2.netlink import NETLINK_SOCK_DIAG, NLMSG_DONE

from tcpexporter.socket_tables.sock_diag import dump_request
from tests.support import _ip, inside, new_netns

DATA = Path(__file__).parent
SEQUENCE = 7
ALL_STATES = 0xFFF
FAMILY_WITHOUT_DIAG = 5

IPV4 = "192.0.2.1"
IPV4_CLIENT = "192.0.2.77"
IPV6 = "2001:db8:102:304:506:708:90a:b0c"
IPV6_CLIENT = "2001:db8:f0e0:d0c0:b0a0:9080:7060:5040"


def main() -> None:
    with opened_sockets():
        for name, family in (("inet", socket.AF_INET), ("inet6", socket.AF_INET6)):
            for number, datagram in enumerate(dump(family)):
                (DATA / f"diag-{name}-{number}.bin").write_bytes(datagram)
        (DATA / "diag-error.bin").write_bytes(next(dump(FAMILY_WITHOUT_DIAG)))
        for name in ("tcp", "tcp6"):
            text = Path("/proc/thread-self/net", name).read_bytes()
            (DATA / f"proc-net-{name}.txt").write_bytes(text)


@contextlib.contextmanager
def opened_sockets() -> Iterator[None]:
    with new_netns() as netns, contextlib.ExitStack() as opened, inside(netns):
        _ip("address", "add", f"{IPV4}/24", "dev", "lo")
        for address in (IPV6, IPV6_CLIENT):
            _ip("address", "add", f"{address}/128", "dev", "lo", "nodad")
        for each in _open_sockets():
            opened.enter_context(each)
        yield


def _open_sockets() -> Iterator[socket.socket]:
    """Opens five listeners, eleven connections to them, and one half-closed connection."""
    ipv4 = _listen(IPV4, 8001)
    yield ipv4
    yield _listen("0.0.0.0", 8002)
    ipv6 = _listen(IPV6, 8003)
    yield ipv6
    yield _listen("::", 8004, v6only=True)
    dual = _listen("::", 8005)
    yield dual
    for port in (40001, 40002, 40003):
        yield from _connect(ipv4, IPV4_CLIENT, port, IPV4)
    for port in (40004, 40005):
        yield from _connect(ipv6, IPV6_CLIENT, port, IPV6)
    for port in (40006, 40007, 40008, 40009, 40010):
        yield from _connect(dual, IPV4_CLIENT, port, IPV4)
    yield from _connect(ipv4, f"::ffff:{IPV4_CLIENT}", 40011, f"::ffff:{IPV4}")
    client, server = _connect(ipv4, IPV4_CLIENT, 40012, IPV4)
    client.shutdown(socket.SHUT_WR)
    server.send(b"\0")  # makes the kernel acknowledge the FIN at once
    yield client
    yield server


def _listen(address: str, port: int, *, v6only: bool = False) -> socket.socket:
    listener = socket.socket(_family(address))
    if ":" in address:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    listener.bind((address, port))
    listener.listen()
    return listener


def _connect(
    listener: socket.socket, source: str, source_port: int, target: str
) -> tuple[socket.socket, socket.socket]:
    client = socket.socket(_family(source))
    client.bind((source, source_port))
    client.connect((target, listener.getsockname()[1]))
    server, _ = listener.accept()
    return client, server


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def dump(family: int, extensions: int = 0) -> Iterator[bytes]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(dump_request(family, ALL_STATES, extensions, SEQUENCE))
        kind = None
        while kind != NLMSG_DONE:
            datagram = netlink.recv(65536)
            kind = int.from_bytes(datagram[4:6], "little")
            yield datagram


if __name__ == "__main__":
    main()
