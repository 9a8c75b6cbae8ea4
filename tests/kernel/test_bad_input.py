# SPDX-License-Identifier: GPL-3.0-only
"""Malformed or forged kernel data gives an error, and changes no connection."""

import contextlib
import ctypes
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2.netlink import NETLINK_SOCK_DIAG, NLMSG_DONE

from tcpexporter.connections.record import Records
from tcpexporter.ebpf import reconcile
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.reconcile import NOTHING
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import SocketTableError
from tcpexporter.host import namespaces
from tcpexporter.socket_tables.sock_diag import SockDiagReader
from tcpexporter.socket_tables.tables import SocketTables
from tests.kernel.helpers.in_process import (
    all_connections,
    at_port,
    invented,
    remove_records,
)
from tests.support import DEADLINE_S, Peers
from tests.unit.socket_tables.samples import message

BTF = Path("/sys/kernel/btf/vmlinux")


class Truncated(SockDiagReader):
    """A socket-table reader whose next dumps fail after their first part."""

    def __init__(self) -> None:
        super().__init__(namespaces.OWN)
        self.dumps_to_break = 0

    def entries(self, *, with_ages: bool) -> Iterator[Records]:
        dump = super().entries(with_ages=with_ages)
        yield next(dump)
        if self.dumps_to_break:
            self.dumps_to_break -= 1
            raise SocketTableError("sock_diag reply: malformed message at byte 4711")
        yield from dump


@pytest.mark.any_kernel
def test_a_truncated_dump_changes_nothing(tracker: Tracker, peers: Peers) -> None:
    """Seeding and reconciling raise an error and change nothing. After a complete dump
    they correct the tracker."""
    reader = Truncated()
    with contextlib.closing(SocketTables([reader])) as tables:
        peers.connect(7)
        reconcile.seed(tracker, tables)
        remove_records(tracker, peers.port)
        peers.connect(5)
        tracker.add(invented(3, local_port=peers.port))
        before = all_connections(tracker)
        for act in (reconcile.seed, reconcile.reconcile, reconcile.reconcile):
            reader.dumps_to_break = 1
            with pytest.raises(SocketTableError, match="byte 4711"):
                act(tracker, tables)
            assert all_connections(tracker).tobytes() == before.tobytes()
        corrections = reconcile.reconcile(tracker, tables)
        assert corrections.missed_close >= 3
        assert reconcile.reconcile(tracker, tables) == NOTHING
    assert len(at_port(tracker, peers.port)) == 12


def test_only_the_kernel_can_answer_a_dump(peers: Peers) -> None:
    """Even root of the namespace cannot send to the exporter's netlink socket."""
    peers.connect(3)
    reader = SockDiagReader(namespaces.OWN)
    target = reader._for_entries._socket.getsockname()
    forged = message(NLMSG_DONE, bytes(4), sequence=1)
    with (
        contextlib.closing(reader),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sender,
    ):
        with pytest.raises(ConnectionRefusedError):
            sender.sendto(forged, target)
        found = [each.copy() for each in reader.entries(with_ages=False)]
    ports = [int(port) for each in found for port in each["key"]["local_port"]]
    assert ports.count(peers.port) == 4


def sock_common(whole: bytes) -> tuple[int, int, int]:
    """Return the type number of sock_common, the offset of its members, and their
    number."""
    types = Btf.of_kernel()
    number = types._find("sock_common")
    size = ctypes.c_uint32()
    libbpf = types._libbpf
    libbpf.btf__raw_data.restype = ctypes.c_void_p
    raw = libbpf.btf__raw_data(types._btf, ctypes.byref(size))
    described = libbpf.btf__type_by_id(types._btf, number).contents
    assert size.value == len(whole)
    at = ctypes.addressof(described) - raw + ctypes.sizeof(described)
    return number, at, described.info & 0xFFFF


def wrong_types(wrong: str) -> bytes:
    """Return malformed BTF: one case that libbpf refuses, and others that it accepts."""
    whole = BTF.read_bytes()
    if wrong == "cut":
        return whole[: len(whole) // 2]
    number, at, count = sock_common(whole)
    nameless = {"in itself": (0, number), "of nothing": (0, 2**31 - 1)}
    member = nameless.get(wrong, (2**31 - 1, number))
    return whole[:at] + struct.pack("=III", *member, 0) * count + whole[at + 12 * count :]


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("cut", "this kernel has no BTF"),
        ("in itself", "this kernel's BTF has no sock_common.skc_"),
        ("of nothing", f"this kernel's BTF is malformed at type {2**31 - 1}"),
        ("without a name", "this kernel's BTF is malformed at type "),
    ],
)
def test_malformed_btf_is_reported(tmp_path: Path, wrong: str, sentence: str) -> None:
    """The loader reads BTF with libbpf; its parent process reports the error, and polls."""
    file = tmp_path / "vmlinux"
    file.write_bytes(wrong_types(wrong))
    run = f"{sys.executable} -m tcpexporter --once --duration 0"
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"mount --bind {file} {BTF} && {run}"],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    # libbpf since 1.3 checks BTF, and refuses the file.
    assert sentence in ended.stderr or "this kernel has no BTF" in ended.stderr
    assert "polling sock_diag" in ended.stderr
    assert "Traceback" not in ended.stderr
