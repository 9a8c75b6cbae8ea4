# SPDX-License-Identifier: GPL-3.0-only
"""The running kernel's types: where a member of a struct is, and whether there is one."""

import ctypes
from collections.abc import Iterator

from tcpexporter.errors import LoadError
from tcpexporter.libbpf import load_libbpf

KIND_STRUCT = 4
KIND_UNION = 5
KIND_TYPEDEF = 8
KIND_FUNC = 12


class _Type(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


class _Member(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class Btf:
    """What libbpf reads from /sys/kernel/btf/vmlinux, in 10 ms.

    The layouts are those of include/uapi/linux/btf.h: the members follow their
    struct; ``info`` has their number in 16 bits and the kind above 24; ``offset``
    is in bits, and shares its word with a size where the struct has bitfields.
    """

    def __init__(self) -> None:
        """Read them.

        Raises:
            SourceError: the kernel has none, or libbpf is not installed.
        """
        self._libbpf = load_libbpf()
        self._libbpf.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        self._libbpf.btf__type_by_id.restype = ctypes.POINTER(_Type)
        self._libbpf.btf__name_by_offset.restype = ctypes.c_char_p
        self._btf = ctypes.c_void_p(self._libbpf.btf__load_vmlinux_btf())
        if not self._btf or self._libbpf.libbpf_get_error(self._btf):
            raise LoadError("this kernel has no BTF")

    def offset(self, struct: str, member: str) -> int:
        """Bytes from the start of ``struct`` to ``member``, be it of an anonymous one.

        Raises:
            LoadError: there is no such struct or member.
        """
        found = self._offset(self._find(struct), member)
        if found is None:
            raise LoadError(f"this kernel's BTF has no {struct}.{member}")
        return found

    def has(self, struct: str, member: str) -> bool:
        """Whether ``struct`` has a member as `offset` finds it."""
        return self._offset(self._find(struct), member) is not None

    def _offset(self, number: int, member: str) -> int | None:
        for name, inner, offset in self._members(number):
            at = (offset & 0xFFFFFF) // 8
            if name == member:
                return at
            within = None if name else self._offset(inner, member)
            if within is not None:
                return at + within
        return None

    def function(self, tracepoint: str) -> int:
        """The type that a program on a tracepoint is loaded with: that of its arguments.

        Raises:
            LoadError: there is no such tracepoint.
        """
        number = self._tracepoint(tracepoint)
        if number < 1:
            raise LoadError(f"this kernel has no tracepoint {tracepoint}")
        return number

    def has_tracepoint(self, tracepoint: str) -> bool:
        """Whether there is one that `function` finds."""
        return self._tracepoint(tracepoint) > 0

    def has_function(self, function: str) -> bool:
        """Whether the kernel has a function of that name."""
        return self._find(function, KIND_FUNC) > 0

    def _tracepoint(self, tracepoint: str) -> int:
        return self._find(f"btf_trace_{tracepoint}", KIND_TYPEDEF)

    def _find(self, name: str, kind: int = KIND_STRUCT) -> int:
        """The number of a type, below 1 where there is none of that name."""
        return int(self._libbpf.btf__find_by_name_kind(self._btf, name.encode(), kind))

    def _members(self, number: int) -> Iterator[tuple[str, int, int]]:
        """Name, type and offset of each member; none of what is no struct or union."""
        if number < 1:
            return
        described = self._libbpf.btf__type_by_id(self._btf, number).contents
        if described.info >> 24 & 0x1F not in (KIND_STRUCT, KIND_UNION):
            return
        first = ctypes.addressof(described) + ctypes.sizeof(described)
        for each in (_Member * (described.info & 0xFFFF)).from_address(first):
            name = self._libbpf.btf__name_by_offset(self._btf, each.name).decode()
            yield name, each.type, each.offset
