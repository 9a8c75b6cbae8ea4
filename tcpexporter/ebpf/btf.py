# SPDX-License-Identifier: GPL-3.0-only
"""The running kernel's types: where a member of a struct is, and whether there is one."""

import ctypes
from collections.abc import Iterator
from typing import Self

from tcpexporter.ebpf.libbpf import load_libbpf
from tcpexporter.errors import LoadError

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
    """What libbpf has read.

    The layouts are those of include/uapi/linux/btf.h: the members follow their
    struct; ``info`` has their number in 16 bits and the kind above 24; ``offset``
    is in bits, and shares its word with a size where the struct has bitfields.
    """

    def __init__(self, libbpf: ctypes.CDLL, types: ctypes.c_void_p) -> None:
        """Look into what a function of libbpf has given, which is kept for good.

        Raises:
            LoadError: it has given nothing.
        """
        self._libbpf = libbpf
        self._libbpf.btf__type_by_id.restype = ctypes.POINTER(_Type)
        self._libbpf.btf__name_by_offset.restype = ctypes.c_char_p
        self._btf = types
        if not self._btf or self._libbpf.libbpf_get_error(self._btf):
            raise LoadError("this kernel has no BTF")

    @classmethod
    def of_kernel(cls) -> Self:
        """Those of /sys/kernel/btf/vmlinux, in 10 ms.

        Raises:
            SourceError: the kernel has none, or libbpf is not installed.
        """
        libbpf = load_libbpf()
        libbpf.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        return cls(libbpf, ctypes.c_void_p(libbpf.btf__load_vmlinux_btf()))

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
        left = [(number, 0)]
        seen = set()
        while left:
            number, begin = left.pop()
            if number in seen:  # no struct is in itself, but a wrong file can say so
                continue
            seen.add(number)
            for name, inner, offset in self._members(number):
                at = begin + (offset & 0xFFFFFF) // 8
                if name == member:
                    return at
                if not name:
                    left.append((inner, at))
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
        found = self._libbpf.btf__type_by_id(self._btf, number)
        if not found:
            raise LoadError(f"this kernel's BTF is malformed at type {number}")
        described = found.contents
        if described.info >> 24 & 0x1F not in (KIND_STRUCT, KIND_UNION):
            return
        first = ctypes.addressof(described) + ctypes.sizeof(described)
        for each in (_Member * (described.info & 0xFFFF)).from_address(first):
            name = self._libbpf.btf__name_by_offset(self._btf, each.name)
            if name is None:
                raise LoadError(f"this kernel's BTF is malformed at type {number}")
            yield name.decode(errors="replace"), each.type, each.offset
