# SPDX-License-Identifier: GPL-3.0-only
"""An empty BPF program at the tracepoint of ours, to measure the cost of any program."""

import contextlib
import os
from collections.abc import Iterator

from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.features import RETURN_0
from tcpexporter.ebpf.program import TRACEPOINT, attach, load


@contextlib.contextmanager
def attached() -> Iterator[None]:
    """Attach the program during the block; attaching takes less than a millisecond."""
    program = load(RETURN_0, Btf.of_kernel().function(TRACEPOINT))
    link = attach(program)
    try:
        yield
    finally:
        os.close(link)
        os.close(program)
