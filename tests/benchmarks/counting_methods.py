# SPDX-License-Identifier: GPL-3.0-only
"""Other methods to count established connections per local port, and lower bounds.

Each method runs in its own process (`tests.benchmarks.worker`). Each function imports what
its method requires, so that other methods do not use that memory.
"""

import os
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks import ROOT, dump

BY_SHELL = (
    "ss -Htn state established |"
    ' awk \'{ sub(/.*:/, "", $3); count[$3]++ }'
    " END { for (port in count) print port, count[port] }'"
)
FIRST_VERSION = Path(__file__).with_name("first_version.c")
KEY = struct.Struct("=16s16sIHH")
ANY_NETNS = 1
RECORD_BYTES = 64

CountMethod = Callable[[], Mapping[int, int] | int]
"""A timed function. It returns connections by local port, or their sum over all ports."""


def ss(_sockets: int) -> CountMethod:
    """Count with ss and awk, in a shell."""
    return _by_ss


def _by_ss() -> Counter[int]:
    shown = subprocess.check_output(["sh", "-c", BY_SHELL], text=True).split()
    return Counter(dict(zip(map(int, shown[::2]), map(int, shown[1::2]), strict=True)))


def psutil(_sockets: int) -> CountMethod:
    """Count with psutil."""
    import psutil  # noqa: PLC0415  only this process imports it

    def by_psutil() -> Counter[int]:
        return Counter(
            each.laddr.port
            for each in psutil.net_connections(kind="tcp")
            if each.status == psutil.CONN_ESTABLISHED
        )

    return by_psutil


def items(sockets: int) -> CountMethod:
    """Count with BCC's `items()`, which makes one or two system calls for each entry."""
    table = _first_version(sockets)

    def by_items() -> Counter[int]:
        return Counter(key.local_port for key, _ in table.items())

    return by_items


def scan(sockets: int) -> CountMethod:
    """Sum 64 bytes per socket, the lower bound of methods that have records in memory."""
    import numpy as np  # noqa: PLC0415  only this process imports it

    records = np.ones((sockets, RECORD_BYTES // 8), np.uint64)

    def by_sum() -> int:
        return int(records.sum()) // (RECORD_BYTES // 8)

    return by_sum


def dumped(_sockets: int) -> CountMethod:
    """Receive the kernel's dump without parsing it, the lower bound of methods that use
    one."""
    return _dumper(tcp_info=False)


def dumped_info(_sockets: int) -> CountMethod:
    """Receive the dump with struct tcp_info, which shows the age of a connection."""
    return _dumper(tcp_info=True)


def _dumper(*, tcp_info: bool) -> CountMethod:
    # Parsed once; afterwards the size of a dump shows the number of sockets.
    decoded = sum(1 for _ in dump.address_pairs())
    decoded_bytes = _dump_bytes(tcp_info=tcp_info)

    def by_dump() -> int:
        return round(decoded * _dump_bytes(tcp_info=tcp_info) / decoded_bytes)

    return by_dump


def _dump_bytes(*, tcp_info: bool) -> int:
    return sum(map(len, dump.received(tcp_info=tcp_info)))


def _first_version(sockets: int) -> Any:
    """Return BCC's hash map, filled with the open sockets."""
    import bcc  # noqa: PLC0415  only this process imports it

    # Like the exporter, this requires no kernel headers.
    os.environ["BCC_KERNEL_SOURCE"] = str(ROOT / "bpf")
    program = bcc.BPF(
        src_file=str(FIRST_VERSION.relative_to(ROOT)),
        cflags=[f"-DMAX_CONNECTIONS={2 * sockets}"],
    )
    table = program["tracked"]
    table.program = program  # the program must live as long as the map
    keys = bytearray().join(_key(*each) for each in dump.address_pairs())
    count = len(keys) // KEY.size
    table.items_update_batch((table.Key * count).from_buffer(keys), (table.Leaf * count)())
    return table


def _key(local_port: int, remote_port: int, local: bytes, remote: bytes) -> bytes:
    return KEY.pack(local, remote, ANY_NETNS, local_port, remote_port)
