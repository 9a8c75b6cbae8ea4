# SPDX-License-Identifier: GPL-3.0-only
"""Makes a BPF program interrupt itself, if the kernel permits that.

It prints how many times that happened, and how many times the kernel counted that it had
prevented it. The program runs at two tracepoints: of system calls, and of bpf_trace_printk,
which it calls in each system call of this process. BCC compiles it, as it compiles the
product's program.
"""

import os
import sys
from pathlib import Path

import bcc

from tcpexporter.ebpf.event_counters import RECURSION_MISSES_BYTES
from tcpexporter.ebpf.maps import program_info

SOURCE = """
BPF_ARRAY(depth, u32, 1);
BPF_ARRAY(nested, u64, 1);

int on_event(struct bpf_raw_tracepoint_args *args)
{
    u32 first = 0, *here = depth.lookup(&first);
    u64 *count = nested.lookup(&first);

    if (!here || !count || bpf_get_current_pid_tgid() >> 32 != OURS)
        return 0;
    if (*here) {
        (*count)++;
        return 0;
    }
    *here = 1;
    bpf_trace_printk("nested");
    *here = 0;
    return 0;
}
"""

SYSTEM_CALLS = 101


def main() -> None:
    os.environ["BCC_KERNEL_SOURCE"] = str(Path(__file__).parents[3] / "bpf")
    program = bcc.BPF(text=SOURCE, cflags=[f"-DOURS={os.getpid()}"])
    for tracepoint in ("bpf_trace_printk", "sys_enter"):
        program.attach_raw_tracepoint(tracepoint, "on_event")
    for _ in range(SYSTEM_CALLS):
        os.getppid()
    loaded = program.load_func("on_event", bcc.BPF.RAW_TRACEPOINT)
    info = program_info(loaded.fd)
    missed = int(info[RECURSION_MISSES_BYTES // info.itemsize])
    sys.stdout.write(f"{program['nested'][0].value} {missed}\n")


if __name__ == "__main__":
    main()
