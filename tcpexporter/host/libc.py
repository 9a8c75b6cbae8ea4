# SPDX-License-Identifier: GPL-3.0-only
"""Calls functions of the C library that Python does not provide.

The man page of the same name describes each function. On failure it raises OSError, as the
functions of `os` do. No other module loads the C library.
"""

import contextlib
import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

MAP_FAILED = ctypes.c_void_p(-1).value
STATFS_BYTES = 256
"""Size of the buffer for struct statfs, in bytes: more than on any architecture."""


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _check(result: int) -> int:
    if result < 0:
        raise _error()
    return result


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call by its number, and return its result: syscall(2).

    Bytes are passed by their address, None as a null pointer.
    """
    passed = (
        ctypes.c_char_p(each)
        if each is None or isinstance(each, bytes)
        else ctypes.c_long(each)
        for each in arguments
    )
    return _check(_libc.syscall(ctypes.c_long(number), *passed))


def prctl(option: int, *arguments: int | bytes | None) -> int:
    """Change or read an attribute of this thread, and return the result of the call.

    Missing arguments, up to four, are 0. Bytes are passed by their address, None as a null
    pointer.
    """
    passed = [
        ctypes.c_char_p(each)
        if each is None or isinstance(each, bytes)
        else ctypes.c_ulong(each)
        for each in (*arguments, 0, 0, 0, 0)[:4]
    ]
    return _check(_libc.prctl(option, *passed))


def address_of(content: bytes) -> tuple[int, object]:
    """Return the address of a copy of ``content``, and the object that keeps it valid."""
    buffer = ctypes.create_string_buffer(content, len(content))
    return ctypes.addressof(buffer), buffer


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the capabilities of this thread; each set has a bit per capability."""
    sets = (effective, permitted, inheritable)
    data = (_CapabilityData * 2)(
        *(
            _CapabilityData(*(each >> shift & 0xFFFFFFFF for each in sets))
            for shift in (0, 32)
        )
    )
    header = _CapabilityHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), data))


def file_system_type(path: str | os.PathLike[str]) -> int:
    """Return the magic number of the file system that holds ``path``: statfs(2)."""
    status = ctypes.create_string_buffer(STATFS_BYTES)
    _check(_libc.statfs(os.fsencode(path), status))
    return int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], "little")


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _check(_libc.unshare(flags))


def mount(source: bytes | None, target: bytes, flags: int) -> None:
    """Mount a file system, or change how one is mounted."""
    _check(_libc.mount(source, target, None, ctypes.c_ulong(flags), None))


def mmap(  # noqa: PLR0917  as mmap(2)
    address: int | None,
    size: int,
    protection: int,
    flags: int,
    descriptor: int = -1,
    offset: int = 0,
) -> int:
    """Map memory at ``address``, or where the kernel chooses; return the address."""
    mapped: int | None = _libc.mmap(address, size, protection, flags, descriptor, offset)
    if mapped is None or mapped == MAP_FAILED:
        raise _error()
    return mapped


def munmap(address: int, size: int) -> None:
    """Unmap ``size`` bytes of memory."""
    _check(_libc.munmap(address, size))


def mallopt(parameter: int, value: int) -> None:
    """Set a parameter of malloc, if the C library is glibc."""
    with contextlib.suppress(AttributeError):
        _libc.mallopt(parameter, value)


def malloc_trim() -> None:
    """Return freed memory to the kernel, if the C library is glibc."""
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(ctypes.c_size_t(0))
