# SPDX-License-Identifier: GPL-3.0-only
"""Other ways to count the established connections of each local port."""

import subprocess
from collections import Counter
from pathlib import Path

BY_SHELL = (
    "ss -Htn state established |"
    ' awk \'{ sub(/.*:/, "", $3); count[$3]++ }'
    " END { for (port in count) print port, count[port] }'"
)
ESTABLISHED = "01"
"""As include/net/tcp_states.h numbers it and /proc/net/tcp writes it."""

DEADLINE_S = 60.0


def by_ss() -> Counter[int]:
    shown = subprocess.check_output(
        ["sh", "-c", BY_SHELL], text=True, timeout=DEADLINE_S
    ).split()
    return Counter(dict(zip(map(int, shown[::2]), map(int, shown[1::2]), strict=True)))


def by_split() -> Counter[int]:
    # thread-self: this thread may be in another namespace than its process.
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    sockets = (line.split() for line in lines)
    return Counter(
        int(local.partition(":")[2], 16)
        for _, local, _, state, *_ in sockets
        if state == ESTABLISHED
    )
