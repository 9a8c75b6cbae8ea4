# SPDX-License-Identifier: GPL-3.0-only
"""Compiles, loads and attaches the BPF program: the loader, a child process.

BCC uses LLVM, which uses 120 MB of memory, so only the loader imports BCC. It sends the
file descriptors of the program and its maps to its parent, the exporter (see `loading`),
and exits. The maps and the attachment exist as long as a descriptor of them is open.
"""

import contextlib
import ctypes
import errno
import os
import resource
import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from tcpexporter.connections.parts import SERIES_FIRST
from tcpexporter.ebpf import program
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.libbpf import BPF_MAP_TYPE_ARRAY, create_map, load_libbpf
from tcpexporter.ebpf.loader_protocol import (
    SEE_DEBUG,
    Descriptors,
    Request,
    out_of_memory,
    receive_request,
    send_descriptors,
    send_reason,
)
from tcpexporter.ebpf.program import TRACEPOINT
from tcpexporter.ebpf.ranges import RANGE_BITS, RANGE_SLOTS, SERIES_RANGE
from tcpexporter.errors import LoadError, TcpExporterError
from tcpexporter.host import libc, privileges

OOM_SCORE_ADJ_MAX = "1000"

LIMITS = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_STACK,
)
"""Resource limits that an operator may set for the service, and that LLVM may exceed."""

BPF_F_NO_PREALLOC = 1

MAPS = tuple(
    each.name for each in fields(Descriptors) if each.name not in ("program", "link")
)

MAX_CLOSINGS = 65536
"""Capacity of the closings log: closings on a busy host during a socket-table dump."""

CLONE_NEWNS = 0x00020000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18


def _main(channel_descriptor: int) -> None:
    _be_killed_first()
    _lift_limits()
    with socket.socket(fileno=channel_descriptor) as channel:
        request = receive_request(channel)
        try:
            descriptors = _load_here(request)
        except TcpExporterError as error:
            send_reason(channel, str(error))
        except MemoryError:
            send_reason(channel, out_of_memory(request))
        else:
            send_descriptors(channel, descriptors)
    os._exit(0)  # BCC cleans up when Python exits


def _be_killed_first() -> None:
    """Make the kernel kill this process, not its parent, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ_MAX)


def _lift_limits() -> None:
    """Remove all resource limits, or raise them as far as the kernel allows."""
    for limit in LIMITS:
        _, hard = resource.getrlimit(limit)
        for wanted in (resource.RLIM_INFINITY, hard):
            # The kernel refuses infinity without CAP_SYS_RESOURCE, and always for open
            # files.
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, (wanted, wanted))
                break


def _load_here(request: Request) -> Descriptors:
    # Imported by the loader only: it uses 0.6 MiB of memory.
    from tcpexporter.ebpf.features import (  # noqa: PLC0415
        HASH_MAP_ALLOCATOR,
        IPV6,
        RECURSION_MISSES,
        SOCKET_CGROUPS,
        Kernel,
        order_of_stores,
    )

    _require_privilege()
    kernel = Kernel(request.without)
    types = kernel.require()
    _hide_kernel_symbols()
    bcc = _import_bcc()
    sources = _sources()
    # BCC expects a kernel's source tree here, and uses its directory include/.
    os.environ["BCC_KERNEL_SOURCE"] = str(sources)
    try:
        bpf = bcc.BPF(
            src_file=str(sources / "tcp_tracker.c"),
            cflags=_cflags(
                sources,
                request,
                types,
                has_allocator=bool(kernel.has(HASH_MAP_ALLOCATOR)),
                is_interruptible=not kernel.has(RECURSION_MISSES),
                has_ipv6=bool(kernel.has(IPV6)),
                has_cgroups=bool(kernel.has(SOCKET_CGROUPS)),
                order=order_of_stores(kernel),
            ),
        )
        code: bytes = bpf.dump_func("on_state_change")
        maps = {name: bpf[name].map_fd for name in MAPS}
    except Exception as error:  # BCC raises Exception itself
        raise LoadError(_why_not_compiled(error, request)) from error
    _fill(maps["free_slots"], range(request.max_connections))
    numbers = range(SERIES_FIRST, SERIES_FIRST + request.max_series)
    _fill(maps["free_series"], numbers, SERIES_RANGE)
    loaded = _load_program(code, types.function(TRACEPOINT))
    return Descriptors(**maps, program=loaded, link=_attach(loaded))


def _why_not_compiled(error: Exception, request: Request) -> str:
    number = _refusal(request.max_connections)
    if number == errno.ENOMEM:
        return out_of_memory(request)
    hint = ""
    if number == errno.EPERM:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        hint = (
            f"; this kernel counts maps as locked memory, of which {limit >> 10} KiB"
            " are allowed: LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited"
        )
    return f"BCC cannot compile the BPF program ({error}), {SEE_DEBUG}{hint}"


def _refusal(max_connections: int) -> int | None:
    """Try to create the largest map; return the kernel's error number, None on success.

    Before Linux 5.11 the number is EPERM if RLIMIT_MEMLOCK is below the size of the map.
    """
    # Imported only here: while BCC compiles, the memory limit must not include numpy.
    from tcpexporter.connections.record import CONNECTION  # noqa: PLC0415

    try:
        os.close(
            create_map(BPF_MAP_TYPE_ARRAY, 4, CONNECTION.itemsize, entries=max_connections)
        )
    except OSError as error:
        return error.errno
    return None


def _fill(stack: int, numbers: range, length: int = RANGE_SLOTS) -> None:
    """Push numbers to a stack of free ones, in ranges; the first number is popped first.

    No range crosses a multiple of ``length``.
    """
    libbpf = load_libbpf()
    for at in reversed(range(numbers.start // length * length, numbers.stop, length)):
        first = max(at, numbers.start)
        following = min(at + length, numbers.stop) - first - 1
        value = ctypes.byref(ctypes.c_uint32(first << RANGE_BITS | following))
        if libbpf.bpf_map_update_elem(stack, None, value, ctypes.c_uint64(0)):
            why = os.strerror(ctypes.get_errno())
            raise LoadError(f"a map of free numbers cannot be filled: {why}")


def _load_program(code: bytes, function: int) -> int:
    try:
        return program.load(code, function)
    except OSError as error:
        sys.stderr.writelines(error.__notes__)
        raise LoadError(
            f"the kernel refuses the BPF program ({error.strerror}), {SEE_DEBUG}"
        ) from error


def _attach(loaded: int) -> int:
    try:
        return program.attach(loaded)
    except OSError as error:
        raise LoadError(
            f"the BPF program cannot be attached to {TRACEPOINT}: {error.strerror}"
        ) from error


def _sources() -> Path:
    """Return the directory of the C sources: in the package, or at the top of the tree."""
    package = Path(__file__).parents[1]
    installed = package / "bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


def _require_privilege() -> None:
    from tcpexporter.ebpf import remedy  # noqa: PLC0415  imported late to save memory

    if not privileges.may_use_bpf():
        raise LoadError(remedy.without_capabilities(remedy.detect()))


def _hide_kernel_symbols() -> None:
    """Hide /proc/kallsyms from BCC to save time, if this process has CAP_SYS_ADMIN.

    Before it compiles, BCC reads all symbols to find out whether the kernel has
    bpf_probe_read_kernel. That takes longer than all other steps. Our program reads
    through typed pointers, and does not call that function.
    """
    with contextlib.suppress(OSError):
        libc.unshare(CLONE_NEWNS)
        # Only in a new mount namespace: no other process sees this mount.
        libc.mount(None, b"/", MS_REC | MS_PRIVATE)
        libc.mount(b"/dev/null", b"/proc/kallsyms", MS_BIND)


def _import_bcc() -> Any:
    try:
        import bcc  # noqa: PLC0415 only the loader imports it, to save memory
    except OSError as error:  # from the dynamic linker
        raise LoadError(
            f"BCC's library cannot be loaded ({error}): install the distribution's package"
            " of BCC again, or raise the memory limit"
        ) from error
    except ImportError as error:
        raise LoadError(
            f"Python cannot import BCC ({error}): install the distribution's python3-bpfcc "
            "or python3-bcc, and its own Python or a virtual environment made from that "
            "with --system-site-packages"
        ) from error
    if not hasattr(bcc, "BPF"):
        raise LoadError(
            f"{bcc.__file__} is not BCC but another project of that name: pip uninstall bcc"
        )
    return bcc


def _cflags(
    sources: Path,
    request: Request,
    types: Btf,
    *,
    has_allocator: bool,
    is_interruptible: bool,
    has_ipv6: bool,
    has_cgroups: bool,
    order: str,
) -> list[str]:
    defines = {
        "MAX_CONNECTIONS": request.max_connections,
        "MAX_CLOSINGS": MAX_CLOSINGS,
        "MAX_SERIES": request.max_series,
        # Allocate memory when an entry is added, if this kernel does that safely.
        "MAP_FLAGS": BPF_F_NO_PREALLOC if has_allocator else 0,
        "INTERRUPTIBLE": int(is_interruptible),
        "ORDER": order,
        "NETNS": request.netns,
        "BY_NETNS": int(request.by_netns),
        "OWN_NETNS": request.own_listener[0],
        "OWN_PORT": request.own_listener[1],
        "OUTBOUND_PORT": request.outbound_port,
        "SECRET_0": f"{request.secret[0]}ULL",
        "SECRET_1": f"{request.secret[1]}ULL",
        **_offsets(types, has_ipv6=has_ipv6),
    }
    if request.by_cgroup and has_cgroups:
        defines |= {"BY_CGROUP": 1, **_cgroup_offsets(types)}
    if request.client_masks:
        defines["CLIENTS"] = 1
        for family, mask in zip(("IPV4", "IPV6"), request.client_masks, strict=True):
            defines |= {f"{family}_MASK_{at}": f"{word}ULL" for at, word in enumerate(mask)}
    if request.lifetime_bounds:
        defines["BUCKETS"] = len(request.lifetime_bounds) + 1
        defines["BOUNDS"] = ",".join(map(str, request.lifetime_bounds))
    if request.lose_one_in:
        defines["LOSE_ONE_IN"] = request.lose_one_in
    return [f"-I{sources}"] + [f"-D{name}={value}" for name, value in defines.items()]


def _offsets(types: Btf, *, has_ipv6: bool) -> dict[str, int]:
    """Return the offsets, in bytes, of the members that the BPF program reads.

    They come from the BTF of the running kernel: headers may be of another version.
    """
    members = ("family", "daddr", "rcv_saddr", "dport", "num", "net")
    ipv6_members = ("v6_daddr", "v6_rcv_saddr")
    # Every socket begins with struct sock_common, and every IP socket with struct
    # inet_sock.
    found = {
        f"SKC_{each.upper()}_OFFSET": types.offset("sock_common", f"skc_{each}")
        for each in members
    }
    # A kernel without IPv6 lacks these, and then the program reads none.
    for each in ipv6_members:
        at = types.offset("sock_common", f"skc_{each}") if has_ipv6 else 0
        found[f"SKC_{each.upper()}_OFFSET"] = at
    found["SK_PROTOCOL_OFFSET"] = types.offset("sock", "sk_protocol")
    found["INET_SPORT_OFFSET"] = types.offset("inet_sock", "inet_sport")
    inum_at = types.offset("ns_common", "inum")
    found["NETNS_INUM_OFFSET"] = types.offset("net", "ns") + inum_at
    return found


def _cgroup_offsets(types: Btf) -> dict[str, int]:
    """Return the offsets, in bytes, that lead to the number of a socket's cgroup.

    They include whether the pointer to the cgroup has flags.
    """
    is_tagged = not types.has("sock_cgroup_data", "cgroup")
    pointer_at = types.offset("sock_cgroup_data", "val" if is_tagged else "cgroup")
    return {
        "TAGGED_CGROUP": int(is_tagged),
        "SK_CGROUP_OFFSET": types.offset("sock", "sk_cgrp_data") + pointer_at,
        "CGROUP_KN_OFFSET": types.offset("cgroup", "kn"),
        "KERNFS_NODE_ID_OFFSET": types.offset("kernfs_node", "id"),
    }


if __name__ == "__main__":
    _main(int(sys.argv[1]))
