# SPDX-License-Identifier: GPL-3.0-only
"""libbpf, which BCC depends on: its bpf(2) calls and its BTF reader."""

import ctypes

from tcpexporter.errors import SourceError

SONAME = "libbpf.so.1"


def load_libbpf() -> ctypes.CDLL:
    """The library, its functions leaving their error in `ctypes.get_errno`.

    Raises:
        SourceError: it is not installed.
    """
    try:
        return ctypes.CDLL(SONAME, use_errno=True)
    except OSError:
        raise SourceError(
            "libbpf is not installed: install the distribution's libbpf1 or libbpf, 1.0 "
            "or later"
        ) from None
