# SPDX-License-Identifier: GPL-3.0-only
"""A second BPF program at the same tracepoint, to compare what both programs count.

It is compiled, loaded and attached in its own process, as BCC's own tools are. Its map
counts the sockets that enter ESTABLISHED, by network namespace and local port.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Self

from tcpexporter.host import namespaces

SOURCE = """
#define TCP_ESTABLISHED 1

BPF_HASH(established, u64, u64);

RAW_TRACEPOINT_PROBE(inet_sock_set_state)
{
    u64 key;
    u32 netns;
    u16 port;
    const char *sk = (const char *)ctx->args[0], *net;

    if (ctx->args[2] != TCP_ESTABLISHED)
        return 0;
    bpf_probe_read_kernel(&net, sizeof(net), sk + SKC_NET_OFFSET);
    bpf_probe_read_kernel(&netns, sizeof(netns), net + NETNS_INUM_OFFSET);
    bpf_probe_read_kernel(&port, sizeof(port), sk + SKC_NUM_OFFSET);
    key = (u64)netns << 16 | port;
    established.increment(key);
    return 0;
}
"""


class Counter:
    """Runs the program during a block."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernel.helpers.second_program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.established(port=0)

    def established(self, port: int) -> int:
        """Return how many sockets at a local port have entered ESTABLISHED so far."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{port}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Detach it."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.close()


def main() -> None:
    """Read ports from standard input, and print the number of sockets of each port."""
    import bcc  # noqa: PLC0415  other processes must not load BCC

    from tcpexporter.ebpf.btf import Btf  # noqa: PLC0415

    types = Btf.of_kernel()
    offset = types.offset("net", "ns") + types.offset("ns_common", "inum")
    os.environ["BCC_KERNEL_SOURCE"] = str(Path(__file__).parents[3] / "bpf")
    program = bcc.BPF(
        text=SOURCE,
        cflags=[
            f"-DSKC_NET_OFFSET={types.offset('sock_common', 'skc_net')}",
            f"-DSKC_NUM_OFFSET={types.offset('sock_common', 'skc_num')}",
            f"-DNETNS_INUM_OFFSET={offset}",
        ],
    )
    table = program["established"]
    netns = namespaces.inode()
    for port in sys.stdin:
        key = table.Key(netns << 16 | int(port))
        count = table[key].value if key in table else 0
        sys.stdout.write(f"{count}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
