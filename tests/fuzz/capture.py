# SPDX-License-Identifier: GPL-3.0-only
"""Writes the seeds that come from this kernel, as root.

    python -m tests.fuzz.capture

The sockets are those of tests/unit/data/capture.py; the other seeds are from BPF maps
created here.
"""

import os
import socket
from pathlib import Path

import numpy as np

from tcpexporter.connections.parts import SECRET
from tcpexporter.connections.record import CONNECTION, words
from tcpexporter.ebpf import loading, pinned_layout, pins
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.maps import FIRST, Map
from tcpexporter.socket_tables.diag_messages import INET_DIAG_INFO
from tests.fuzz.choices import SEEDS
from tests.unit.data.capture import dump, opened_sockets


def main() -> None:
    with opened_sockets():
        for name, family in (("inet", socket.AF_INET), ("inet6", socket.AF_INET6)):
            for number, datagram in enumerate(dump(family, 1 << INET_DIAG_INFO - 1)):
                _write("sock_diag", f"{name}-info-{number}", datagram)
        for choice, name in ((0, "tcp"), (1, "tcp6")):
            text = Path("/proc/thread-self/net", name).read_bytes()
            _write("procfs", name, bytes([choice, 255]) + text)
    counted = Request(max_connections=1, netns=0, secret=SECRET)
    layout = pins._make_layout(counted)
    said = np.zeros(pinned_layout.LAYOUT_WORDS, np.uint32)
    Map(layout, "layouts").read(FIRST, said)
    _write("pinned", "words", said.tobytes() + _records_and_words())
    descriptors = loading.load(counted)
    for name, descriptor in (
        ("layout", layout),
        ("connections", descriptors.connections),
        ("link", descriptors.link),
    ):
        _write("fdinfo", name, Path(f"/proc/self/fdinfo/{descriptor}").read_bytes())
    descriptors.close()
    os.close(layout)


def _records_and_words() -> bytes:
    records = np.zeros(3, CONNECTION)
    records["key"]["local_address"][:2, 10:12] = 0xFF
    records["key"]["local_port"] = [443, 443, 0]
    times = np.arange(1, 4, dtype=np.uint64) * np.uint64(10**9)
    return records.tobytes() + words(np.full(3, 5, np.uint32), times).tobytes()


def _write(target: str, name: str, content: bytes) -> None:
    (SEEDS / target).mkdir(parents=True, exist_ok=True)
    (SEEDS / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
