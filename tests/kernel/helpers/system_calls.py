# SPDX-License-Identifier: GPL-3.0-only
"""The numbers of system calls that differ between architectures.

On x86-64 they are in arch/x86/entry/syscalls/syscall_64.tbl of the kernel, on arm64 in
include/uapi/asm-generic/unistd.h.
"""

import os

NUMBERS = {
    "x86_64": {"bpf": 321, "sendmsg": 46, "socket": 41},
    "aarch64": {"bpf": 280, "sendmsg": 211, "socket": 198},
}[os.uname().machine]
