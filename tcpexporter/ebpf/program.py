# SPDX-License-Identifier: GPL-3.0-only
"""Loads and attaches programs of the tracepoint sock:inet_sock_set_state."""

import contextlib
import ctypes
import os

from tcpexporter.ebpf.libbpf import call

TRACEPOINT = "inet_sock_set_state"

BPF_PROG_TYPE_TRACING = 26
BPF_TRACE_RAW_TP = 23
INSTRUCTION_BYTES = 8
VERIFIER_LOG_BYTES = 1 << 20


class _LoadOptions(ctypes.Structure):
    """``struct bpf_prog_load_opts`` of libbpf 1.0 and later."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_void_p),
    )


def load(code: bytes, function: int) -> int:
    """Load a program that BCC has compiled; BCC itself cannot load this type of program.

    Args:
        code: the instructions of the program.
        function: the type number that `Btf.function` returns.

    Returns:
        The program's file descriptor.

    Raises:
        OSError: the kernel refuses the program; a note has the output of the verifier.
    """
    try:
        return _load(code, function)
    except OSError as refusal:
        # Again, for the log: to write it takes the verifier longer than everything else.
        log = ctypes.create_string_buffer(VERIFIER_LOG_BYTES)
        with contextlib.suppress(OSError):
            os.close(_load(code, function, log))
        refusal.add_note(log.value.decode(errors="replace"))
        raise


def _load(
    code: bytes, function: int, log: "ctypes.Array[ctypes.c_char] | None" = None
) -> int:
    options = _LoadOptions(
        size=ctypes.sizeof(_LoadOptions),
        expected_attach_type=BPF_TRACE_RAW_TP,
        attach_btf_id=function,
        log_level=1 if log else 0,
        log_size=len(log) if log else 0,
        log_buf=ctypes.addressof(log) if log else None,
    )
    return call(
        "bpf_prog_load",
        BPF_PROG_TYPE_TRACING,
        b"on_state_change",
        b"GPL",
        code,
        ctypes.c_size_t(len(code) // INSTRUCTION_BYTES),
        ctypes.byref(options),
    )


def attach(program: int) -> int:
    """Attach a program to the tracepoint that it was loaded for.

    Returns:
        A file descriptor of the attachment. The program stays attached as long as the
        descriptor or a pin of it exists.

    Raises:
        OSError: the kernel refuses the attachment.
    """
    return call("bpf_raw_tracepoint_open", None, program)
