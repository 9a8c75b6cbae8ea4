# SPDX-License-Identifier: GPL-3.0-only
"""libbpf, which BCC depends on: its bpf(2) calls and its BTF reader."""

import ctypes

from tcpexporter.errors import SourceError

SONAMES = ("libbpf.so.1", "libbpf.so.0")


def load_libbpf() -> ctypes.CDLL:
    """The library, its functions leaving their error in `ctypes.get_errno`.

    Raises:
        SourceError: it is not installed.
    """
    for soname in SONAMES:
        try:
            return ctypes.CDLL(soname, use_errno=True)
        except OSError:
            continue
    raise SourceError(
        "libbpf is not installed: install the distribution's libbpf1 or libbpf"
    )
