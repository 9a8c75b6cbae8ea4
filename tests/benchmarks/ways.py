# SPDX-License-Identifier: GPL-3.0-only
"""Other ways to count established connections per local port, and the floor below all.

Each runs in a process of its own (`tests.benchmarks.worker`), so that it finds nothing
loaded and nothing of it is in anybody else's memory. What is imported here is only what
all of them need.
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

Way = Callable[[], Mapping[int, int] | int]
"""What is timed. Gives connections by local port, or how many of all ports."""


def ss(_sockets: int) -> Way:
    """The shell way."""
    return _by_ss


def _by_ss() -> Counter[int]:
    shown = subprocess.check_output(["sh", "-c", BY_SHELL], text=True).split()
    return Counter(dict(zip(map(int, shown[::2]), map(int, shown[1::2]), strict=True)))


def psutil(_sockets: int) -> Way:
    """The Python way."""
    import psutil  # noqa: PLC0415  see above

    def by_psutil() -> Counter[int]:
        return Counter(
            each.laddr.port
            for each in psutil.net_connections(kind="tcp")
            if each.status == psutil.CONN_ESTABLISHED
        )

    return by_psutil


def items(sockets: int) -> Way:
    """The way of a first version with BCC: a system call or two for each entry."""
    table = _first_version(sockets)

    def by_items() -> Counter[int]:
        return Counter(key.local_port for key, _ in table.items())

    return by_items


def scan(sockets: int) -> Way:
    """The floor of whoever has a record of each in memory."""
    import numpy as np  # noqa: PLC0415  see above

    records = np.ones((sockets, RECORD_BYTES // 8), np.uint64)

    def by_sum() -> int:
        return int(records.sum()) // (RECORD_BYTES // 8)

    return by_sum


def dumped(_sockets: int) -> Way:
    """The floor of whoever asks the kernel: receive it, do not look at it."""
    return _dumper(tcp_info=False)


def dumped_info(_sockets: int) -> Way:
    """The same with struct tcp_info, which has what a connection's age is told by."""
    return _dumper(tcp_info=True)


def _dumper(*, tcp_info: bool) -> Way:
    # Decoded once. Later on the size alone tells how many there are.
    decoded = sum(1 for _ in dump.address_pairs())
    decoded_bytes = _dump_bytes(tcp_info=tcp_info)

    def by_dump() -> int:
        return round(decoded * _dump_bytes(tcp_info=tcp_info) / decoded_bytes)

    return by_dump


def _dump_bytes(*, tcp_info: bool) -> int:
    return sum(map(len, dump.received(tcp_info=tcp_info)))


def _first_version(sockets: int) -> Any:
    """BCC's hash map of the sockets that there are."""
    import bcc  # noqa: PLC0415  see above

    # As the exporter does: no kernel headers are needed.
    os.environ["BCC_KERNEL_SOURCE"] = str(ROOT / "bpf")
    program = bcc.BPF(
        src_file=str(FIRST_VERSION.relative_to(ROOT)),
        cflags=[f"-DMAX_CONNECTIONS={2 * sockets}"],
    )
    table = program["tracked"]
    table.program = program  # which closes the map when it goes
    keys = bytearray().join(_key(*each) for each in dump.address_pairs())
    count = len(keys) // KEY.size
    table.items_update_batch((table.Key * count).from_buffer(keys), (table.Leaf * count)())
    return table


def _key(local_port: int, remote_port: int, local: bytes, remote: bytes) -> bytes:
    return KEY.pack(local, remote, ANY_NETNS, local_port, remote_port)
