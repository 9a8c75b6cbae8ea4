# SPDX-License-Identifier: GPL-3.0-only
"""Compiles and loads the BPF program that had no series numbers and no ledger.

The present program is compared with it. As in `tcpexporter.ebpf.loader`, a child process
compiles it, because BCC uses much memory.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tcpexporter.ebpf import loader
from tcpexporter.ebpf.features import HASH_MAP_ALLOCATOR, IPV6, Kernel, order_of_stores
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.program import TRACEPOINT
from tcpexporter.ebpf.program import load as load_program
from tests.benchmarks import ROOT

SOURCE = Path(__file__).with_suffix(".c")
LOADED = b"loaded"


def load(max_connections: int, netns: int) -> int:
    """Load the program; return its descriptor, which the caller closes.

    Args:
        max_connections: the number of connection slots.
        netns: inode of the only network namespace to observe.

    Raises:
        CalledProcessError: it was not loaded; the reason is on standard error.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        numbers = (str(each) for each in (theirs.fileno(), max_connections, netns))
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.earlier_program", *numbers],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            check=True,
        )
        _, (descriptor,), _, _ = socket.recv_fds(ours, len(LOADED), 1)
    return descriptor


def _main(channel_descriptor: int, max_connections: int, netns: int) -> None:
    with socket.socket(fileno=channel_descriptor) as channel:
        # The program has references to its maps.
        loaded = _load_here(Request(max_connections, netns, secret=(1, 2)))
        socket.send_fds(channel, [LOADED], [loaded])


def _load_here(request: Request) -> int:
    kernel = Kernel()
    types = kernel.require()
    loader._hide_kernel_symbols()
    bcc = loader._import_bcc()
    os.environ["BCC_KERNEL_SOURCE"] = str(loader._sources())
    cflags = loader._cflags(
        SOURCE.parent,
        request,
        types,
        has_allocator=bool(kernel.has(HASH_MAP_ALLOCATOR)),
        has_ipv6=bool(kernel.has(IPV6)),
        has_cgroups=False,
        is_interruptible=False,
        order=order_of_stores(kernel),
    )
    compiled = bcc.BPF(src_file=str(SOURCE), cflags=cflags)
    loader._fill(compiled["free_slots"].map_fd, range(request.max_connections))
    return load_program(compiled.dump_func("on_state_change"), types.function(TRACEPOINT))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
