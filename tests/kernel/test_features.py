# SPDX-License-Identifier: GPL-3.0-only
"""The exporter detects the features of this kernel, and works without each optional one."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tcpexporter.ebpf import event_counters, features, program, reconcile
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.features import FEATURES, Feature
from tcpexporter.ebpf.loader import BPF_F_NO_PREALLOC
from tcpexporter.ebpf.reconciler import Reconciler
from tcpexporter.host.privileges import CAP_BPF
from tests.kernel.helpers.in_process import Dumps, at_port, attach
from tests.kernel.test_faults import WITHOUT_BTF
from tests.kernel.test_process import AS_NOBODY, COMMAND, refused, statuses
from tests.support import DEADLINE_S, Exporter, Peers, eventually

REQUIRED = [each for each in FEATURES if each.required]
NOBODY = 65534


@cache
def symbols() -> frozenset[str]:
    """Return the names of the kernel's functions, from /proc/kallsyms: proc_kallsyms(5)."""
    lines = Path("/proc/kallsyms").read_text().splitlines()
    return frozenset(line.split()[2] for line in lines)


def symbol(name: str) -> Callable[[], bool]:
    return lambda: name in symbols()


READ_A_MAP = """
import ctypes, sys
libbpf = ctypes.CDLL("libbpf.so.1")
number = ctypes.byref(ctypes.c_uint32(0))
sys.exit(libbpf.bpf_map_lookup_elem(int(sys.argv[1]), number, number) != 0)
"""


def unprivileged_can_read_a_map() -> bool:
    """Return whether a process that was root before setuid(2) can still read a map."""
    tracker = attach(7)
    descriptor = tracker._descriptors.recording
    python = os.path.realpath(sys.executable)  # users other than root can run this copy
    ended = subprocess.run(
        [python, "-I", "-S", "-c", READ_A_MAP, str(descriptor)],
        check=False,
        pass_fds=[descriptor],
        user=NOBODY,
        cwd="/",
    )
    tracker.close()
    return ended.returncode == 0


def has_version_of_exchange() -> bool:
    """Return whether the version has the exchange; no kernel in our tests backports it."""
    version = tuple(map(int, os.uname().release.split(".")[:2]))
    return version >= ((5, 18) if os.uname().machine == "aarch64" else (5, 12))


def landlock_is_booted() -> bool:
    """Return whether securityfs lists Landlock as a security module."""
    mount = "mount -t securityfs none /sys/kernel/security; cat /sys/kernel/security/lsm"
    listed = subprocess.check_output(["unshare", "--mount", "sh", "-c", mount], text=True)
    return "landlock" in listed.split(",")


CHECKS: dict[Feature, Callable[[], bool]] = {
    features.BTF: Path("/sys/kernel/btf/vmlinux").exists,
    features.STATES: symbol("__bpf_trace_inet_sock_set_state"),
    features.TYPED_PROGRAMS: symbol("btf_ctx_access"),
    features.BOOT_TIME: symbol("bpf_ktime_get_boot_ns"),
    features.SOCKET_CAST: symbol("bpf_skc_to_tcp_sock"),
    features.MAPPED_ARRAYS: symbol("array_map_mmap"),
    features.STACKS: symbol("stack_map_pop_elem"),
    features.BATCHES: symbol("htab_map_lookup_and_delete_batch"),
    features.HASH_MAP_ALLOCATOR: symbol("bpf_mem_alloc_init"),
    features.RECURSION_MISSES: symbol("bpf_prog_inc_misses_counter"),
    features.STORE_ORDER: lambda: os.uname().machine == "x86_64",
    features.EXCHANGE: has_version_of_exchange,
    features.UNPRIVILEGED_MAPS: unprivileged_can_read_a_map,
    features.SECCOMP: Path("/proc/sys/kernel/seccomp/actions_avail").exists,
    features.LANDLOCK: landlock_is_booted,
    features.IPV6: Path("/proc/sys/net/ipv6").exists,
    features.SOCKET_CGROUPS: symbol("cgroup_sk_alloc"),
}
"""Another way to detect each feature, by the name of the feature."""


def listed(*command: str) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """Run ``--features``; return its answers by name, and the ended process."""
    ended = subprocess.run(
        [*command, "--features"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    header, *lines = ended.stdout.splitlines()
    there = slice(header.index("AVAILABLE"), header.index("USED BY"))
    names = {line[: there.start].strip(): line[there].strip() for line in lines}
    return {each.name: names[each.name] for each in FEATURES}, ended


@cache
def listed_for_root() -> dict[str, str]:
    there, ended = listed(*COMMAND)
    assert ended.returncode == 0
    assert ended.stderr == ""
    return there


def found(feature: Feature) -> bool:
    """Return whether ``--features`` says that this kernel has the feature."""
    return {"yes": True, "no": False}[listed_for_root()[feature.name]]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda each: each.name)
def test_a_feature_is_detected(feature: Feature) -> None:
    """``--features`` agrees with another way to detect the feature."""
    assert found(feature) is CHECKS[feature]()


def test_recursion_is_prevented_by_kernels_that_count_it() -> None:
    """A program that interrupts itself runs twice, or the kernel counts a missed run."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kernel.helpers.recursive_program"],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    nested, missed = map(int, ended.stdout.split())
    is_counted = found(features.RECURSION_MISSES)
    assert (nested == 0) is is_counted
    assert (missed >= 101) is is_counted
    assert nested + missed >= 101


@pytest.mark.any_kernel
def test_features_are_listed_before_anything_is_opened() -> None:
    """``--features`` succeeds even if the port is in use and the user does not exist."""
    with Peers() as peers:
        occupied = ("--listen", f"127.0.0.1:{peers.port}", "--user", "no-such-user")
        _, ended = listed(*COMMAND, *occupied)
    assert ended.returncode == 0


@pytest.mark.any_kernel
def test_without_root_unknown_features_are_marked() -> None:
    """BTF is readable without root. Loading programs requires root, so other features
    are marked "?"."""
    there, ended = listed(*AS_NOBODY)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert there[features.TYPED_PROGRAMS.name] == "?"
    assert there[features.STACKS.name] == "?"
    assert there[features.BTF.name] == "yes"
    assert "no" not in {there[each.name] for each in REQUIRED}
    assert ended.stdout.splitlines()[-1].startswith("? cannot be determined: requires root")


@pytest.mark.any_kernel
def test_features_are_listed_without_btf() -> None:
    """Features that are found in BTF are then marked as unknown."""
    there, ended = listed(*WITHOUT_BTF)
    assert ended.returncode == 0
    assert there[features.BTF.name] == "no"
    assert there[features.STATES.name] == "?"
    assert there[features.BATCHES.name] == "yes"


RUN_WITHOUT = """
import sys
from functools import partial
from tcpexporter import request
from tcpexporter.__main__ import main
request.Request = partial(request.Request, without=(sys.argv.pop(1),))
main()
"""


def without(feature: Feature) -> tuple[str, ...]:
    """Return a command that runs the exporter as on a kernel without the feature."""
    return (sys.executable, "-c", RUN_WITHOUT, feature.name)


@pytest.mark.any_kernel
@pytest.mark.parametrize("feature", REQUIRED, ids=lambda each: each.name)
def test_without_a_required_feature_ebpf_is_refused(feature: Feature) -> None:
    """Exit code 1 and one sentence: the missing feature, its origin, and a source that
    works."""
    code, sentence = refused("--source", "ebpf", command=without(feature))
    assert code == 1
    assert sentence == (
        f"tcpexporter: this kernel has no {feature.name} (requires {feature.since}):"
        " use another kernel, or --source sock_diag"
    )


@pytest.mark.any_kernel
def test_root_without_bpf_permission_gets_a_clear_error() -> None:
    """Root of a user namespace has all capabilities there, but bpf(2) checks for others."""
    command = ("unshare", "--user", "--map-root-user", *COMMAND)
    code, sentence = refused("--source", "ebpf", command=command)
    assert code == 1
    assert "the kernel refuses bpf(2) in a user namespace" in sentence
    assert "--source sock_diag" in sentence


@pytest.mark.any_kernel
def test_without_a_required_feature_auto_polls() -> None:
    """The exporter counts with sock_diag, and its warning names the missing feature."""
    with Exporter(command=without(features.BATCHES)) as exporter, Peers() as peers:
        peers.connect(7)
        eventually(lambda: exporter.established(peers.port) == 7)
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        _, complaints = exporter.stop()
    (warning,) = (line for line in complaints.splitlines() if "WARNING" in line)
    assert "polling sock_diag, because ebpf does not work" in warning
    assert "no batch operations" in warning


def map_flags(descriptor: int) -> int:
    """Return the flags of a map: bpf_map_show_fdinfo in the kernel's syscall.c."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    (flags,) = (line.split()[1] for line in lines if line.startswith("map_flags:"))
    return int(flags, 16)


def test_memory_for_entries_is_allocated_late_if_that_is_safe() -> None:
    """Hash maps are preallocated unless they have their own allocator."""
    expected = BPF_F_NO_PREALLOC if found(features.HASH_MAP_ALLOCATOR) else 0
    tracker = attach()
    assert map_flags(tracker._descriptors.slots) == expected
    assert map_flags(tracker._descriptors.closings) == expected
    tracker.close()


def test_preallocated_maps_work_too() -> None:
    """With preallocated maps the exporter sees openings, closings and pre-existing
    connections."""
    with Peers() as peers:
        peers.connect(11)
        tracker = attach(without=(features.HASH_MAP_ALLOCATOR.name,))
        assert map_flags(tracker._descriptors.slots) == 0
        assert map_flags(tracker._descriptors.closings) == 0
        with Dumps() as dumps:
            reconcile.seed(tracker, dumps)
        peers.connect(7)
        assert len(at_port(tracker, peers.port)) == 18
        for client, server in peers.pairs[8:]:
            client.close()
            server.close()
        assert len(at_port(tracker, peers.port)) == 8
        assert tracker.events().refused == 0
        tracker.close()


def test_a_kernel_without_ipv6_has_ipv4() -> None:
    """The program is loaded without the offsets of IPv6 addresses, and counts IPv4."""
    tracker = attach(without=(features.IPV6.name,))
    with Peers() as peers:
        peers.connect(7)
        assert len(at_port(tracker, peers.port)) == 7
    tracker.close()


def test_a_program_that_can_interrupt_itself_counts_events_atomically() -> None:
    """The counters of events are those of the connections; before Linux 6.1 a run of the
    program could interrupt another one on its CPU, and one of two increments was lost."""
    tracker = attach(without=(features.RECURSION_MISSES.name,))
    with Peers() as peers:
        peers.connect(7)
        for client, _ in peers.pairs[4:]:
            client.close()
        assert len(at_port(tracker, peers.port)) == 7 - 3
        events = tracker.events()
    assert events.inserted >= 14  # both ends
    assert events.removed >= 3 * 2
    tracker.close()


MAP_READING_REQUIRES_CAP_BPF = """
from tcpexporter.host import privileges
from tcpexporter.__main__ import main
privileges.works_with = lambda kept, *_: bool(kept)
main()
"""


def test_only_cap_bpf_is_kept_if_reading_a_map_requires_it() -> None:
    """No other capability is effective, child processes cannot inherit it, and a line is
    logged."""
    command = (sys.executable, "-c", MAP_READING_REQUIRES_CAP_BPF)
    with Exporter("--source", "ebpf", command=command) as exporter, Peers() as peers:
        for shown in statuses(exporter.process.pid):
            assert shown["Uid"] == [str(NOBODY)] * 4
            for held in ("CapEff", "CapPrm"):
                assert int(shown[held][0], 16) == 1 << CAP_BPF
            for held in ("CapInh", "CapBnd", "CapAmb"):
                assert int(shown[held][0], 16) == 0
        peers.connect(7)
        assert exporter.established(peers.port) == 7
        _, complaints = exporter.stop()
    assert "keeping CAP_BPF" in complaints


def test_without_a_count_of_missed_events_the_thread_reconciles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an old kernel bpf_prog_info has 0; reconciling at the interval corrects the
    misses."""
    monkeypatch.setattr(
        event_counters, "program_info", lambda _descriptor: np.zeros(64, np.uint64)
    )
    tracker = attach(lose_one_in=1)
    events = tracker.events
    monkeypatch.setattr(tracker, "events", lambda: events()._replace(unrecorded=0))
    with Dumps() as dumps, Peers() as peers:
        reconciler = Reconciler(tracker, dumps, interval_s=1, cpu_share=1)
        reconciler.start()
        peers.connect(7)
        assert tracker.missed_events() == 0
        eventually(lambda: len(at_port(tracker, peers.port)) == 7)
        reconciler.close()
    tracker.close()


def test_a_refused_program_has_the_output_of_the_verifier() -> None:
    """A program that only exits has no return value."""
    only_exit = b"\x95" + bytes(7)
    with pytest.raises(OSError, match="Permission denied") as error:
        program.load(only_exit, Btf.of_kernel().function(program.TRACEPOINT))
    assert "R0 !read_ok" in "".join(error.value.__notes__)
