# SPDX-License-Identifier: GPL-3.0-only
"""Compiles, loads and attaches the BPF program, in a child that ends when it has done so.

BCC brings LLVM with it: 120 MB that only this module's child ever holds. The
child hands the descriptors of what it made to its parent and exits; the maps
and the attachment live as long as their descriptors.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tcpexporter.btf import Btf
from tcpexporter.errors import LoadError, SourceError

log = logging.getLogger(__name__)

TRACEPOINT = "sock:inet_sock_set_state"
TRACING_DIRECTORIES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
LOAD_TIMEOUT_S = 60
LAST_WORDS_TIMEOUT_S = 0.5
MESSAGE_BYTES = 65536
SEE_DEBUG = "--log-level debug shows what it said"

BPF_F_NO_PREALLOC = 1

CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39


@dataclass(frozen=True)
class Request:
    """What the child is asked to load."""

    max_connections: int
    """How many entries each map can hold."""
    netns: int
    """Inode of the only network namespace to watch, 0: all."""
    lose_one_in: int = 0
    """For tests: of how many events one is lost by chance, 0: none."""


@dataclass(frozen=True)
class Descriptors:
    """What keeps the program alive, and the way to its maps."""

    tracked: int
    seeded: int
    events: int
    program: int
    perf_event: int

    def close(self) -> None:
        """Detach the program and free its maps."""
        for descriptor in astuple(self):
            os.close(descriptor)


@dataclass(frozen=True)
class Loaded:
    """A program that is attached."""

    descriptors: Descriptors
    knows_netns: bool
    """Whether it tells network namespaces apart; else that of every key is 0."""
    counts_misses: bool
    """Whether the kernel counts all the events that it did not run the program for."""


def load(request: Request) -> Loaded:
    """Have a child load the program, and take over what it made.

    Raises:
        LoadError: it could not be loaded; says why and what would help.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as complaints:
        ours.settimeout(LOAD_TIMEOUT_S)
        with theirs:
            child = subprocess.Popen(
                # -I: a bcc in the working directory or on PYTHONPATH is not run as root
                [sys.executable, "-I", "-m", "tcpexporter.loader", str(theirs.fileno())]
                + [str(value) for value in astuple(request)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
            )
        try:
            return _receive(ours)
        finally:
            _end(child)
            complaints.seek(0)
            for line in complaints.read().decode(errors="replace").splitlines():
                log.debug("loader: %s", line)


def _end(child: subprocess.Popen[bytes]) -> None:
    """It ends by itself, unless it hangs or nobody waits for it any more."""
    try:
        child.wait(LAST_WORDS_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _receive(channel: socket.socket) -> Loaded:
    expected = len(fields(Descriptors))
    try:
        message, descriptors, _, _ = socket.recv_fds(
            channel, MESSAGE_BYTES, expected, socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise LoadError(
            f"the BPF program was not loaded within {LOAD_TIMEOUT_S} s"
        ) from None
    if not message:
        raise LoadError(f"the process that loads the BPF program died, {SEE_DEBUG}")
    outcome = json.loads(message)
    if "error" in outcome:
        raise LoadError(outcome["error"])
    return Loaded(Descriptors(*descriptors), **outcome)


def _main(channel_descriptor: int, request: Request) -> None:
    with socket.socket(fileno=channel_descriptor) as channel:
        try:
            loaded = _load_here(request)
        except SourceError as error:
            channel.send(json.dumps({"error": str(error)}).encode())
        else:
            outcome = asdict(loaded)
            descriptors = outcome.pop("descriptors").values()
            socket.send_fds(channel, [json.dumps(outcome).encode()], list(descriptors))
    os._exit(0)  # BCC detaches when Python exits


def _load_here(request: Request) -> Loaded:
    _require_privilege()
    _require_tracepoint()
    bcc = _import_bcc()
    sources = _sources()
    types = _types(needed=request.netns != 0)
    # BCC takes it for a kernel's source tree, and looks into its include/.
    os.environ["BCC_KERNEL_SOURCE"] = str(sources)
    try:
        bpf = bcc.BPF(
            src_file=str(sources / "tcp_tracker.c"),
            cflags=_cflags(sources, request, types),
        )
        program = bpf.load_func("on_state_change", bcc.BPF.TRACEPOINT)
        bpf.attach_tracepoint(tp=TRACEPOINT, fn_name="on_state_change")
    except Exception as error:  # BCC raises nothing more particular
        raise LoadError(
            f"BCC cannot load the BPF program ({error}), {SEE_DEBUG}"
        ) from error
    descriptors = Descriptors(
        tracked=bpf["tracked"].map_fd,
        seeded=bpf["seeded"].map_fd,
        events=bpf["events"].map_fd,
        program=program.fd,
        perf_event=bpf.tracepoint_fds[TRACEPOINT.encode()],
    )
    return Loaded(
        descriptors, knows_netns=types is not None, counts_misses=_counts_misses(types)
    )


def _sources() -> Path:
    """The directory of the C program: in the package, or beside it in the source tree."""
    package = Path(__file__).parent
    installed = package / "bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


def _require_privilege() -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    effective = next(
        int(line.split()[1], 16) for line in status if line.startswith("CapEff:")
    )
    if not (
        effective >> CAP_SYS_ADMIN & 1
        or (effective >> CAP_BPF & 1 and effective >> CAP_PERFMON & 1)
    ):
        raise LoadError("BPF takes root, or CAP_BPF and CAP_PERFMON: start it with sudo")


def _require_tracepoint() -> None:
    if not any((tracing / "events").is_dir() for tracing in TRACING_DIRECTORIES):
        raise LoadError(
            "the kernel's tracepoints cannot be seen: "
            "mount -t tracefs tracefs /sys/kernel/tracing"
        )
    path = Path("events", *TRACEPOINT.split(":"))
    if not any((tracing / path).is_dir() for tracing in TRACING_DIRECTORIES):
        raise LoadError(
            f"this kernel has no tracepoint {TRACEPOINT}: Linux 4.16 and later do"
        )


def _import_bcc() -> Any:
    try:
        import bcc  # noqa: PLC0415  only the child may hold it
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


def _types(*, needed: bool) -> Btf | None:
    try:
        return Btf()
    except SourceError as error:
        if needed:
            raise LoadError(
                f"{error}, so network namespaces cannot be told apart: --netns all counts "
                "them together"
            ) from error
        return None


def _cflags(sources: Path, request: Request, types: Btf | None) -> list[str]:
    defines = {
        "MAX_CONNECTIONS": request.max_connections,
        "MAP_FLAGS": _map_flags(types),
        "NETNS": request.netns,
        **_netns_offsets(types),
    }
    if request.lose_one_in:
        defines["LOSE_ONE_IN"] = request.lose_one_in
    return [f"-I{sources}"] + [f"-D{name}={value}" for name, value in defines.items()]


def _map_flags(types: Btf | None) -> int:
    """Memory for a map's entries is taken when they come, where that is safe.

    A map for 262,144 takes 4 MiB then and not 30, before there is any entry. In a
    tracepoint it is safe since hash maps have their own allocator: Linux kernel commit
    fba1a1c6c912 ("bpf: Convert hash map to bpf_mem_alloc.") (in v6.1).
    """
    has_allocator = types is not None and types.mentions("bpf_htab", "ma")
    return BPF_F_NO_PREALLOC if has_allocator else 0


def _netns_offsets(types: Btf | None) -> dict[str, int]:
    """Where a socket's network namespace is found, in bytes.

    Only the running kernel's BTF knows it. Headers may be another version's.
    """
    if types is None:
        return {}
    return {
        "SKC_NET_OFFSET": types.offset("sock_common", "skc_net"),
        "NETNS_INUM_OFFSET": types.offset("net", "ns") + types.offset("ns_common", "inum"),
    }


def _counts_misses(types: Btf | None) -> bool:
    """Whether ``recursion_misses`` is counted for tracepoints, too.

    It is since Linux kernel commit dd8657894c11 ("bpf: Count missed stats in
    trace_call_bpf") (in v6.7). Nothing shows that one, but what came with it does:
    ``missed`` in ``struct bpf_link_info``, by commit 3acf8ace6823 ("bpf: Add missed
    value to kprobe perf link info").
    """
    return types is not None and types.mentions("bpf_link_info", "missed")


if __name__ == "__main__":
    _main(int(sys.argv[1]), Request(*map(int, sys.argv[2:])))
