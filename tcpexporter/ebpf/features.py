# SPDX-License-Identifier: GPL-3.0-only
"""What the kernel has of what differs between kernels: found by trying it.

A version would not tell: distributions take features into older kernels, and leave
others out when they build one.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from tcpexporter.ebpf import program, remedy
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.libbpf import BPF_MAP_TYPE_ARRAY, call, create_map
from tcpexporter.ebpf.program import TRACEPOINT
from tcpexporter.errors import LoadError
from tcpexporter.host import landlock, privileges, seccomp

BPF_MAP_TYPE_HASH = 1
BPF_MAP_TYPE_STACK = 23
BPF_F_MMAPABLE = 1 << 10

FIRST_ARGUMENT = bytes.fromhex("7911000000000000")  # r1 = *(u64 *)(r1 + 0)
CALL_KTIME_GET_BOOT_NS = bytes.fromhex("850000007d000000")
CALL_SKC_TO_TCP_SOCK = bytes.fromhex("8500000089000000")
RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")  # r0 = 0; exit

Answer = bool | None
"""Whether something is there; None where that cannot be told."""

Probe = Callable[[Btf | None], Answer]
"""Takes the kernel's types, where it has them. Raises OSError as the kernel refuses."""

POLLS = "sock_diag is polled"


@dataclass(frozen=True)
class Feature:
    """What some kernels have and others have not."""

    name: str
    takes: str
    """What has it."""
    needed: str
    """By which source, and for what."""
    without: str
    """What is done where it is not there."""
    probe: Probe

    @property
    def required(self) -> bool:
        """Whether the BPF program cannot do without."""
        return self.without == POLLS


class Kernel:
    """The running kernel, which is asked for a feature when somebody wants to know."""

    def __init__(self, without: Collection[str] = ()) -> None:
        """Read its types; features named by ``without`` are taken as not there.

        Raises:
            SourceError: libbpf is not installed.
        """
        self._without = without
        self._types: Btf | None = None
        if BTF.name not in without:
            with contextlib.suppress(LoadError):
                self._types = Btf.of_kernel()

    def has(self, feature: Feature) -> Answer:
        """Whether it has a feature."""
        if feature.name in self._without:
            return False
        try:
            return feature.probe(self._types)
        except OSError as error:
            # A seccomp filter may also answer that the kernel does not have bpf(2).
            refused = error.errno in {errno.EPERM, errno.EACCES, errno.ENOSYS}
            return None if refused else False

    def require(self) -> Btf:
        """See that it has what the BPF program cannot do without; gives its types.

        All of it takes 1.5 ms.

        Raises:
            LoadError: it has not; names what is missing, and what has that. Or it refuses
                to tell, so it would refuse the program too.
        """
        answers = {each: self.has(each) for each in FEATURES if each.required}
        lacking = [
            f"no {each.name} (it takes {each.takes})"
            for each, answer in answers.items()
            if answer is False
        ]
        if lacking or self._types is None:
            raise LoadError(
                f"this kernel has {', '.join(lacking)}: use another, or --source sock_diag"
            )
        if None in answers.values():
            raise LoadError(remedy.despite_capabilities(remedy.detect()))
        return self._types


def table(kernel: Kernel) -> str:
    """Every feature, as a person reads it."""
    answers = {True: "yes", False: "no", None: "?"}
    rows = [("FEATURE", "THERE", "NEEDED BY", "WITHOUT IT")]
    rows += [
        (each.name, answers[kernel.has(each)], each.needed, each.without)
        for each in FEATURES
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if any(answers[None] == there for _, there, *_ in rows):
        lines.append("? cannot be told here: it takes root, and for the most part BTF")
    return "".join(f"{line}\n" for line in lines)


def _in_types(look: Callable[[Btf], Answer]) -> Probe:
    return lambda types: None if types is None else look(types)


def _loading(*code: bytes) -> Probe:
    def load(types: Btf) -> Answer:
        if not types.has_tracepoint(TRACEPOINT):
            return None
        os.close(program.load(b"".join(code), types.function(TRACEPOINT)))
        return True

    return _in_types(load)


@contextlib.contextmanager
def _map(kind: int, *, flags: int = 0) -> Iterator[int]:
    """The descriptor of a map for one number."""
    key_bytes = 0 if kind == BPF_MAP_TYPE_STACK else 4
    descriptor = create_map(kind, key_bytes, 4, flags=flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _maps_an_array(_types: Btf | None) -> Answer:
    with _map(BPF_MAP_TYPE_ARRAY, flags=BPF_F_MMAPABLE):
        return True


def _pops_from_a_stack(_types: Btf | None) -> Answer:
    number = ctypes.byref(ctypes.c_uint32(7))
    with _map(BPF_MAP_TYPE_STACK) as stack:
        call("bpf_map_update_elem", stack, None, number, ctypes.c_uint64(0))
        call("bpf_map_lookup_and_delete_elem", stack, None, number)
    return True


def _changes_many_entries(_types: Btf | None) -> Answer:
    number, count = ctypes.byref(ctypes.c_uint32(7)), ctypes.byref(ctypes.c_uint32(1))
    with _map(BPF_MAP_TYPE_HASH) as entries:
        call("bpf_map_update_batch", entries, number, number, count, None)
        call("bpf_map_delete_batch", entries, number, count, None)
    return True


def _reads_without_cap_bpf(_types: Btf | None) -> Answer:
    number = ctypes.byref(ctypes.c_uint32(0))
    with _map(BPF_MAP_TYPE_ARRAY) as array:
        needed = partial(call, "bpf_map_lookup_elem", array, number, number)
        return privileges.works_with(0, None, needed)


BTF = Feature(
    "BTF",
    "CONFIG_DEBUG_INFO_BTF",
    "ebpf, to find what it reads of a socket",
    POLLS,
    lambda types: types is not None,
)
"""Linux kernel commit 341dfcf8d78e ("btf: expose BTF info through sysfs") (in v5.4)."""

STATES = Feature(
    f"tracepoint {TRACEPOINT}",
    "Linux 4.16",
    "ebpf, to be told of each change of state",
    POLLS,
    _in_types(lambda types: types.has_tracepoint(TRACEPOINT)),
)
"""Linux kernel commit 563e0bb0dc74 ("net: tracepoint: replace tcp_set_state tracepoint with
inet_sock_set_state tracepoint") (in v4.16)."""

TYPED_PROGRAMS = Feature(
    "tp_btf programs",
    "Linux 5.5",
    "ebpf, to read a socket where it is",
    POLLS,
    _loading(RETURN_0),
)
"""The program of a tracepoint's function gets the socket as a pointer that the verifier
knows the type of, so it may read through it: Linux kernel commit 9e15db66136a ("bpf:
Implement accurate raw_tp context access via BTF") (in v5.5)."""

BOOT_TIME = Feature(
    "bpf_ktime_get_boot_ns",
    "Linux 5.8",
    "ebpf, to know when a connection was established",
    POLLS,
    _loading(CALL_KTIME_GET_BOOT_NS, RETURN_0),
)
"""Linux kernel commit 71d19214776e ("bpf: add bpf_ktime_get_boot_ns()") (in v5.8)."""

SOCKET_CAST = Feature(
    "bpf_skc_to_tcp_sock",
    "Linux 5.9",
    "ebpf, to know the port of a socket that was reset",
    POLLS,
    _loading(FIRST_ARGUMENT, CALL_SKC_TO_TCP_SOCK, RETURN_0),
)
"""Linux kernel commit 478cfbdf5f13 ("bpf: Add bpf_skc_to_{tcp, tcp_timewait,
tcp_request}_sock() helpers") (in v5.9)."""

MAPPED_ARRAYS = Feature(
    "BPF_F_MMAPABLE",
    "Linux 5.5",
    "ebpf, to count without system calls",
    POLLS,
    _maps_an_array,
)
"""Linux kernel commit fc9702273e2e ("bpf: Add mmap() support for BPF_MAP_TYPE_ARRAY") (in
v5.5)."""

STACKS = Feature(
    "LOOKUP_AND_DELETE of stacks",
    "Linux 4.20",
    "ebpf, to take free slots",
    POLLS,
    _pops_from_a_stack,
)
"""Linux kernel commits f1a2e44a3aec ("bpf: add queue and stack maps") and bd513cd08f10
("bpf: add MAP_LOOKUP_AND_DELETE_ELEM syscall") (in v4.20)."""

BATCHES = Feature(
    "batch operations",
    "Linux 5.6",
    "ebpf, to compare with the socket tables",
    POLLS,
    _changes_many_entries,
)
"""Linux kernel commit 057996380a42 ("bpf: Add batch ops to all htab bpf map") (in v5.6)."""

HASH_MAP_ALLOCATOR = Feature(
    "allocator of hash maps",
    "Linux 6.1",
    "ebpf, to take memory when a connection comes",
    "it is taken at the start",
    _in_types(lambda types: types.has("bpf_htab", "ma")),
)
"""It makes that safe in a tracepoint. A map for 262,144 takes 4 MiB then and not 20, before
there is any entry. Linux kernel commit fba1a1c6c912 ("bpf: Convert hash map to
bpf_mem_alloc.") (in v6.1)."""

RECURSION_MISSES = Feature(
    "recursion misses",
    "Linux 6.1",
    "ebpf, to know of events that it missed",
    "none is missed: the program runs within itself",
    _in_types(lambda types: types.has_function("bpf_prog_inc_misses_counter")),
)
"""The kernel does not run the program while it runs on the same CPU already, and counts how
often: Linux kernel commit 05b24ff9b2cf ("bpf: Prevent bpf program recursion for raw
tracepoint probes") (in v6.1), which gave the function that counts its name. To make it
happen takes a program on every system call of the host: that is left to a test."""

UNPRIVILEGED_MAPS = Feature(
    "maps without CAP_BPF",
    "Linux 5.19",
    "ebpf, to give up every capability",
    "CAP_BPF is kept",
    _reads_without_cap_bpf,
)
"""A bpf(2) call on a descriptor took it, unless that sysctl is 0, before Linux kernel
commit c8644cd0efe7 ("bpf: refine kernel.unprivileged_bpf_disabled behaviour") (in
v5.19)."""

SECCOMP = Feature(
    "seccomp filters",
    "CONFIG_SECCOMP_FILTER",
    "all, to refuse system calls that serving does not take",
    "none is refused",
    lambda _types: seccomp.has_filters(),
)
"""Linux kernel commit e2cfabdfd075 ("seccomp: add system call filtering using BPF") (in
v3.5)."""

LANDLOCK = Feature(
    "Landlock",
    "Linux 5.13",
    "all, to refuse files that serving does not take",
    "what everybody may read can be read",
    lambda _types: landlock.abi_version() > 0,
)
"""Linux kernel commit 265885daf3e5 ("landlock: Add syscall implementations") (in v5.13). It
has to be among the security modules that the kernel was booted with."""

IPV6 = Feature(
    "IPv6",
    "CONFIG_IPV6",
    "ebpf, to read IPv6 addresses",
    "there are none",
    _in_types(lambda types: types.has("sock_common", "skc_v6_daddr")),
)
"""``struct sock_common`` has its addresses only then: include/net/sock.h."""

FEATURES = (
    BTF,
    STATES,
    TYPED_PROGRAMS,
    BOOT_TIME,
    SOCKET_CAST,
    MAPPED_ARRAYS,
    STACKS,
    BATCHES,
    HASH_MAP_ALLOCATOR,
    RECURSION_MISSES,
    UNPRIVILEGED_MAPS,
    SECCOMP,
    LANDLOCK,
    IPV6,
)
