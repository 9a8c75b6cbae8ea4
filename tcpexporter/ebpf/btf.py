# SPDX-License-Identifier: GPL-3.0-only
"""Looks up structs, their members and functions in the running kernel's BTF."""

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
    """The types of BTF that libbpf has read.

    The layouts are those of include/uapi/linux/btf.h. The members follow their struct. The
    low 16 bits of ``info`` are the number of members; the kind begins at bit 24. The unit
    of ``offset`` is bits. If the struct has bitfields, the high 8 bits of ``offset`` are a
    size.
    """

    def __init__(self, libbpf: ctypes.CDLL, types: ctypes.c_void_p) -> None:
        """Use the types that a function of libbpf has returned; they are never freed.

        Raises:
            LoadError: the function of libbpf has failed.
        """
        self._libbpf = libbpf
        self._libbpf.btf__type_by_id.restype = ctypes.POINTER(_Type)
        self._libbpf.btf__name_by_offset.restype = ctypes.c_char_p
        self._btf = types
        if not self._btf or self._libbpf.libbpf_get_error(self._btf):
            raise LoadError("this kernel has no BTF")

    @classmethod
    def of_kernel(cls) -> Self:
        """Read /sys/kernel/btf/vmlinux, which takes 10 ms.

        Raises:
            SourceError: the kernel has no BTF, or libbpf is not installed.
        """
        libbpf = load_libbpf()
        libbpf.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        return cls(libbpf, ctypes.c_void_p(libbpf.btf__load_vmlinux_btf()))

    def offset(self, struct: str, member: str) -> int:
        """Return how many bytes ``member`` is from the start of ``struct``.

        The member may be in an anonymous struct or union inside ``struct``.

        Raises:
            LoadError: the kernel has no such struct or member.
        """
        found = self._offset(self._find(struct), member)
        if found is None:
            raise LoadError(f"this kernel's BTF has no {struct}.{member}")
        return found

    def has(self, struct: str, member: str) -> bool:
        """Return whether `offset` would find ``member`` in ``struct``."""
        return self._offset(self._find(struct), member) is not None

    def _offset(self, number: int, member: str) -> int | None:
        left = [(number, 0)]
        seen = set()
        while left:
            number, begin = left.pop()
            if number in seen:  # a struct contains itself only in malformed BTF
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
        """Return the number of the type of a tracepoint's arguments.

        bpf(2) requires this number to load a program for the tracepoint.

        Raises:
            LoadError: the kernel has no such tracepoint.
        """
        number = self._tracepoint(tracepoint)
        if number < 1:
            raise LoadError(f"this kernel has no tracepoint {tracepoint}")
        return number

    def has_tracepoint(self, tracepoint: str) -> bool:
        """Return whether the kernel has this tracepoint."""
        return self._tracepoint(tracepoint) > 0

    def has_function(self, function: str) -> bool:
        """Return whether the kernel has a function with this name."""
        return self._find(function, KIND_FUNC) > 0

    def _tracepoint(self, tracepoint: str) -> int:
        return self._find(f"btf_trace_{tracepoint}", KIND_TYPEDEF)

    def _find(self, name: str, kind: int = KIND_STRUCT) -> int:
        """Return the number of a type; it is below 1 if no type has this name."""
        return int(self._libbpf.btf__find_by_name_kind(self._btf, name.encode(), kind))

    def _members(self, number: int) -> Iterator[tuple[str, int, int]]:
        """Yield the name, type and offset of each member of a struct or union."""
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
