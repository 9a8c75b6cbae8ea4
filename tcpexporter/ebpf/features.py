# SPDX-License-Identifier: GPL-3.0-only
"""Detects the kernel features that tcpexporter uses, by trying them.

A version number does not show them: distributions backport features to older kernels, and
disable features in their builds.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from tcpexporter.connections import memory_order
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
EXCHANGE_OWN = bytes.fromhex(
    "7a0af8ff00000000 b701000001000000 db1af8ffe1000000"
)  # *(u64 *)(r10 - 8) = 0; r1 = 1; r1 = xchg((u64 *)(r10 - 8), r1)
RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")  # r0 = 0; exit

Answer = bool | None
"""Whether the kernel has a feature; None if that cannot be determined."""

Probe = Callable[[Btf | None], Answer]
"""A function that probes a feature. Its argument is the kernel's types; None without BTF.
It may raise OSError."""

POLLS = "sock_diag is polled"


@dataclass(frozen=True)
class Feature:
    """A kernel feature that tcpexporter uses and that some kernels lack."""

    name: str
    since: str
    """The kernel version or configuration option that provides it."""
    used_by: str
    """The sources that use it, and their purpose."""
    without: str
    """The effect on the exporter if the kernel does not have the feature."""
    probe: Probe
    required: bool = False
    """Whether the BPF program requires the feature."""


class Kernel:
    """The running kernel; each call of `has` probes the feature again."""

    def __init__(self, without: Collection[str] = ()) -> None:
        """Read the kernel's types.

        Args:
            without: for tests: the names of features to treat as missing.

        Raises:
            SourceError: libbpf is not installed.
        """
        self._without = without
        self._types: Btf | None = None
        if BTF.name not in without:
            with contextlib.suppress(LoadError):
                self._types = Btf.of_kernel()

    def has(self, feature: Feature) -> Answer:
        """Return whether the kernel has a feature."""
        if feature.name in self._without:
            return False
        try:
            return feature.probe(self._types)
        except OSError as error:
            # ENOSYS may come from a seccomp filter, in a kernel that has bpf(2).
            refused = error.errno in {errno.EPERM, errno.EACCES, errno.ENOSYS}
            return None if refused else False

    def require(self) -> Btf:
        """Check that the kernel has every required feature, and return its types.

        This takes 1.5 ms.

        Raises:
            LoadError: features are missing, and the message names them. Or the kernel
                refuses the probes, so it would refuse the BPF program too.
        """
        answers = {each: self.has(each) for each in FEATURES if each.required}
        lacking = [
            f"no {each.name} (requires {each.since})"
            for each, answer in answers.items()
            if answer is False
        ]
        if lacking or self._types is None:
            raise LoadError(
                f"this kernel has {', '.join(lacking)}: use another kernel, or --source"
                " sock_diag"
            )
        if None in answers.values():
            raise LoadError(remedy.despite_capabilities(remedy.detect()))
        return self._types


def table(kernel: Kernel) -> str:
    """Return a table of all features and their state, as text."""
    answers = {True: "yes", False: "no", None: "?"}
    rows = [("FEATURE", "AVAILABLE", "USED BY", "WITHOUT IT")]
    rows += [
        (each.name, answers[kernel.has(each)], each.used_by, each.without)
        for each in FEATURES
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if any(answers[None] == answer for _, answer, *_ in rows):
        lines.append("? cannot be determined: requires root, and BTF for most features")
    return "".join(f"{line}\n" for line in lines)


def order_of_stores(kernel: Kernel) -> str:
    """Return the value of ORDER in bpf/tcp_tracker.c for a kernel."""
    if kernel.has(STORE_ORDER):
        return "ORDERED"
    return "BY_EXCHANGE" if kernel.has(EXCHANGE) else "BY_STACK"


def _in_types(probe: Callable[[Btf], Answer]) -> Probe:
    return lambda types: None if types is None else probe(types)


def _loading(*code: bytes) -> Probe:
    def load(types: Btf) -> Answer:
        if not types.has_tracepoint(TRACEPOINT):
            return None
        os.close(program.load(b"".join(code), types.function(TRACEPOINT)))
        return True

    return _in_types(load)


@contextlib.contextmanager
def _map(kind: int, *, flags: int = 0) -> Iterator[int]:
    """Create a map with one entry of 4 bytes, and yield its descriptor."""
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
    "ebpf, to find the members of a socket",
    POLLS,
    lambda types: types is not None,
    required=True,
)
"""Linux kernel commit 341dfcf8d78e ("btf: expose BTF info through sysfs") (in v5.4)."""

STATES = Feature(
    f"tracepoint {TRACEPOINT}",
    "Linux 4.16",
    "ebpf, to get an event for each change of state",
    POLLS,
    _in_types(lambda types: types.has_tracepoint(TRACEPOINT)),
    required=True,
)
"""Linux kernel commit 563e0bb0dc74 ("net: tracepoint: replace tcp_set_state tracepoint with
inet_sock_set_state tracepoint") (in v4.16)."""

TYPED_PROGRAMS = Feature(
    "tp_btf programs",
    "Linux 5.5",
    "ebpf, to read a socket by typed pointers",
    POLLS,
    _loading(RETURN_0),
    required=True,
)
"""The program gets a pointer to the socket. The verifier knows the pointer's type, so the
program may read through it: Linux kernel commit 9e15db66136a ("bpf: Implement accurate
raw_tp context access via BTF") (in v5.5)."""

BOOT_TIME = Feature(
    "bpf_ktime_get_boot_ns",
    "Linux 5.8",
    "ebpf, to get the time when a connection is established",
    POLLS,
    _loading(CALL_KTIME_GET_BOOT_NS, RETURN_0),
    required=True,
)
"""Linux kernel commit 71d19214776e ("bpf: add bpf_ktime_get_boot_ns()") (in v5.8)."""

SOCKET_CAST = Feature(
    "bpf_skc_to_tcp_sock",
    "Linux 5.9",
    "ebpf, to get the port of a socket that was reset",
    POLLS,
    _loading(FIRST_ARGUMENT, CALL_SKC_TO_TCP_SOCK, RETURN_0),
    required=True,
)
"""Linux kernel commit 478cfbdf5f13 ("bpf: Add bpf_skc_to_{tcp, tcp_timewait,
tcp_request}_sock() helpers") (in v5.9)."""

MAPPED_ARRAYS = Feature(
    "BPF_F_MMAPABLE",
    "Linux 5.5",
    "ebpf, to count without system calls",
    POLLS,
    _maps_an_array,
    required=True,
)
"""Linux kernel commit fc9702273e2e ("bpf: Add mmap() support for BPF_MAP_TYPE_ARRAY") (in
v5.5)."""

STACKS = Feature(
    "LOOKUP_AND_DELETE of stacks",
    "Linux 4.20",
    "ebpf, to allocate slots",
    POLLS,
    _pops_from_a_stack,
    required=True,
)
"""Linux kernel commits f1a2e44a3aec ("bpf: add queue and stack maps") and bd513cd08f10
("bpf: add MAP_LOOKUP_AND_DELETE_ELEM syscall") (in v4.20)."""

BATCHES = Feature(
    "batch operations",
    "Linux 5.6",
    "ebpf, to compare with the socket tables",
    POLLS,
    _changes_many_entries,
    required=True,
)
"""Linux kernel commit 057996380a42 ("bpf: Add batch ops to all htab bpf map") (in v5.6)."""

HASH_MAP_ALLOCATOR = Feature(
    "allocator of hash maps",
    "Linux 6.1",
    "ebpf, to allocate memory when a connection opens",
    "all memory is allocated at the start",
    _in_types(lambda types: types.has("bpf_htab", "ma")),
)
"""This allocator makes it safe to allocate memory in a tracepoint. An empty map for 262,144
entries uses 4 MiB with it, and 20 MiB without it. Linux kernel commit fba1a1c6c912 ("bpf:
Convert hash map to bpf_mem_alloc.") (in v6.1)."""

RECURSION_MISSES = Feature(
    "recursion misses",
    "Linux 6.1",
    "ebpf, to count missed events",
    "no event is missed: the program can interrupt itself",
    _in_types(lambda types: types.has_function("bpf_prog_inc_misses_counter")),
)
"""The kernel skips the program while the program runs on the same CPU, and counts these
misses: Linux kernel commit 05b24ff9b2cf ("bpf: Prevent bpf program recursion for raw
tracepoint probes") (in v6.1). The probe looks for the function that counts, which that
commit named. It does not cause a miss: that would require a program on every system call of
the host."""

STORE_ORDER = Feature(
    "total store order",
    "x86-64",
    "ebpf, to store a connection in the order in which it is read",
    "the BPF program orders stores by an exchange",
    lambda _types: memory_order.IS_TOTAL,
)

EXCHANGE = Feature(
    "atomic exchange in BPF",
    "Linux 5.12; on arm64, 5.18",
    "ebpf, to order stores",
    "without total store order, stores are ordered by a lock that all CPUs share",
    _loading(EXCHANGE_OWN, RETURN_0),
)
"""Linux kernel commits 5ffa25502b5a ("bpf: Add instructions for atomic_[cmp]xchg") (in
v5.12) and 1902472b4fa9 ("bpf, arm64: Support more atomic operations") (in v5.18)."""

UNPRIVILEGED_MAPS = Feature(
    "maps without CAP_BPF",
    "Linux 5.19",
    "ebpf, to drop all capabilities",
    "CAP_BPF is kept",
    _reads_without_cap_bpf,
)
"""In kernels without it, a bpf(2) call on a descriptor requires CAP_BPF, unless the sysctl
kernel.unprivileged_bpf_disabled is 0. Linux kernel commit c8644cd0efe7 ("bpf: refine
kernel.unprivileged_bpf_disabled behaviour") (in v5.19)."""

SECCOMP = Feature(
    "seccomp filters",
    "CONFIG_SECCOMP_FILTER",
    "all, to refuse system calls that serving does not make",
    "no system call is refused",
    lambda _types: seccomp.has_filters(),
)
"""Linux kernel commit e2cfabdfd075 ("seccomp: add system call filtering using BPF") (in
v3.5)."""

LANDLOCK = Feature(
    "Landlock",
    "Linux 5.13",
    "all, to refuse access to files that serving does not read",
    "all files that any user may read are readable",
    lambda _types: landlock.abi_version() > 0,
)
"""Linux kernel commit 265885daf3e5 ("landlock: Add syscall implementations") (in v5.13). It
must be one of the security modules that the kernel was booted with."""

IPV6 = Feature(
    "IPv6",
    "CONFIG_IPV6",
    "ebpf, to read IPv6 addresses",
    "the kernel has no IPv6 addresses to read",
    _in_types(lambda types: types.has("sock_common", "skc_v6_daddr")),
)
"""``struct sock_common`` has IPv6 addresses only with CONFIG_IPV6: include/net/sock.h."""

SOCKET_CGROUPS = Feature(
    "cgroups of sockets",
    "CONFIG_SOCK_CGROUP_DATA",
    "ebpf, for the labels unit, container and pod",
    "these labels are empty",
    _in_types(lambda types: types.has("sock", "sk_cgrp_data")),
)
"""``struct sock`` has its cgroup only with that option: include/net/sock.h. Linux kernel
commit bd1060a1d671 ("sock, cgroup: add sock->sk_cgroup") (in v4.5)."""

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
    STORE_ORDER,
    EXCHANGE,
    UNPRIVILEGED_MAPS,
    SECCOMP,
    LANDLOCK,
    IPV6,
    SOCKET_CGROUPS,
)
