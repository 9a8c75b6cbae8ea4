# SPDX-License-Identifier: GPL-3.0-only
"""Calls libbpf, for bpf(2) and for reading BTF. BCC depends on libbpf too."""

import ctypes
import os
from functools import cache
from typing import Any

from tcpexporter.errors import SourceError

SONAME = "libbpf.so.1"

BPF_MAP_TYPE_ARRAY = 2
"""include/uapi/linux/bpf.h."""


@cache  # loading it again takes 60 us, which a scrape would notice
def load_libbpf() -> ctypes.CDLL:
    """Return the library; its functions store their error for `ctypes.get_errno`.

    Raises:
        SourceError: libbpf is not installed.
    """
    try:
        return ctypes.CDLL(SONAME, use_errno=True)
    except OSError:
        raise SourceError(
            "libbpf is not installed: install the distribution's libbpf1 or libbpf, 1.0 "
            "or later"
        ) from None


class _MapOptions(ctypes.Structure):
    """``struct bpf_map_create_opts`` of libbpf, up to the last field that is used."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )


def create_map(
    kind: int, key_bytes: int, value_bytes: int, *, entries: int = 1, flags: int = 0
) -> int:
    """Create a map and return its file descriptor.

    Raises:
        OSError: the kernel refuses the map.
        SourceError: libbpf is not installed.
    """
    options = _MapOptions(size=ctypes.sizeof(_MapOptions), map_flags=flags)
    made = ctypes.byref(options)
    return call("bpf_map_create", kind, None, key_bytes, value_bytes, entries, made)


def call(function: str, *arguments: Any) -> int:
    """Call a function of libbpf, and return its result.

    Raises:
        OSError: the kernel refuses the call: the result is negative.
        SourceError: libbpf is not installed.
    """
    result: int = getattr(load_libbpf(), function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
