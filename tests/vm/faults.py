# SPDX-License-Identifier: GPL-3.0-only
"""Tests that are too disruptive for a machine in use; `make vm-test` runs them in a guest.

They share an exporter, which none of them may disturb. Their order matters: changes that
cannot be undone are last.
"""

import contextlib
import http.client
import os
import subprocess
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tcpexporter.ebpf import program
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.features import FEATURES, RETURN_0, UNPRIVILEGED_MAPS, Kernel
from tcpexporter.host import privileges
from tests.kernel.test_process import assert_root_is_dropped
from tests.support import (
    DEADLINE_S,
    Exporter,
    Peers,
    eventually,
    repeating,
    ss_established,
)

if "vm.init=" not in Path("/proc/cmdline").read_text():
    raise RuntimeError("these tests suspend the machine: run them in a guest")

DURATION_S = 19
ASLEEP_S = 23
"""Longer than `DURATION_S`, so connections can become long-term during the sleep."""
DAYS_S = 11 * 24 * 3600

SHARING = Path("/sys/bus/virtio/drivers/9pnet_virtio")
MEM_SLEEP = Path("/sys/power/mem_sleep")
ALARM = Path("/sys/class/rtc/rtc0/wakealarm")
UNPRIVILEGED_BPF = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
LOCKDOWN = Path("/sys/kernel/security/lockdown")

READ_KERNEL = bytes.fromhex(
    "bfa1000000000000 07010000f8ffffff"  # r1 = r10 - 8
    "b702000008000000 b703000000000000"  # r2 = 8; r3 = 0
    "8500000071000000"  # call bpf_probe_read_kernel
)


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    often = ("--reconcile-interval", "1", "--reconcile-cpu", "100")
    with Exporter("--source", "ebpf", "--duration", str(DURATION_S), *often) as running:
        yield running
        code, complaints = running.stop()
    assert code == 0
    assert "Traceback" not in complaints


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with Peers() as opened:
        yield opened


def assert_counts(exporter: Exporter, peers: Peers) -> None:
    """Check that the counts equal those of ss(8), also after connections open and close."""
    before = len(peers.pairs)
    peers.connect(11)
    assert ss_established(peers.port)["4"] == before + 11
    assert exporter.established(peers.port) == before + 11
    for each in chain(*peers.pairs[before + 7 :]):
        each.close()
    del peers.pairs[before + 7 :]
    assert ss_established(peers.port)["4"] == before + 7
    assert exporter.established(peers.port) == before + 7


# --- Suspend ---


@contextlib.contextmanager
def without_shared_directories() -> Iterator[None]:
    """Unmount directories that the host shares by 9p: their driver does not support
    suspend."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mounts = [each for each in lines if each[2] == "9p"]
    devices = [each.name for each in SHARING.glob("virtio*")]
    assert devices
    for _, where, *_ in mounts:
        subprocess.run(["umount", where], check=True)
    for each in devices:
        (SHARING / "unbind").write_text(each)
    try:
        yield
    finally:
        for each in devices:
            (SHARING / "bind").write_text(each)
        for tag, where, _, options, *_ in mounts:
            how = f"trans=virtio,msize=512000,{options.partition(',')[0]}"
            subprocess.run(["mount", "-t", "9p", "-o", how, tag, where], check=True)


def boottime_s() -> float:
    """Return the seconds since the machine booted, asleep or not: clock_gettime(2)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def suspend(seconds: int) -> float:
    """Suspend until the alarm of the clock: Documentation/power/states of the kernel.

    Suspend to RAM if the machine can do it, as on x86-64. The emulated machine of arm64 has
    only s2idle, during which CLOCK_MONOTONIC may continue.

    Returns:
        How long the machine slept, in seconds.
    """
    if "deep" in MEM_SLEEP.read_text():
        MEM_SLEEP.write_text("deep")
    ALARM.write_text(f"+{seconds}")
    began_s = boottime_s()
    Path("/sys/power/state").write_text("mem")
    return boottime_s() - began_s


@contextlib.contextmanager
def connecting(peers: Peers) -> Iterator[None]:
    """Open connections continuously during the block, and keep them open."""
    with repeating(lambda: peers.connect(1), pause_s=0.02):
        yield


def test_ages_increase_while_the_machine_sleeps(exporter: Exporter, peers: Peers) -> None:
    """Connections become long-term; those that open just before the sleep are counted
    too."""
    began_s = boottime_s()
    peers.connect(7)
    assert exporter.established(peers.port) == 7
    assert exporter.long_term(peers.port) == 0
    with without_shared_directories(), connecting(peers):
        slept_s = suspend(ASLEEP_S)
    assert slept_s > DURATION_S
    opened = len(peers.pairs)
    assert exporter.established(peers.port) == opened > 7
    long_term = exporter.long_term(peers.port)
    assert long_term is not None
    assert 7 <= long_term <= opened
    awake_s = boottime_s() - began_s - slept_s
    assert awake_s < DURATION_S, "the machine is too slow"
    assert_counts(exporter, peers)
    for kind in ("missed_open", "missed_close"):
        assert exporter.value("tcpexporter_corrections_total", kind=kind) == 0


# --- The clock ---


@contextlib.contextmanager
def clock_set(by_s: int) -> Iterator[None]:
    """Change the time of day during the block, as ``date -s`` does."""

    def step(seconds: int) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    step(by_s)
    try:
        yield
    finally:
        step(-by_s)


def test_a_clock_step_changes_no_age(exporter: Exporter, peers: Peers) -> None:
    """The step makes no connection long-term, and none loses that state. HTTP continues.

    Only the time of the last reconciliation uses the wall clock.
    """
    eventually(lambda: exporter.long_term(peers.port) == len(peers.pairs))
    old = len(peers.pairs)
    kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE_S)
    kept.connect()
    kept.auto_open = 0  # with a new connection the test would show nothing
    began_s = time.monotonic()
    peers.connect(5)
    for by_s in (DAYS_S, -DAYS_S):
        with clock_set(by_s):
            long_term = exporter.long_term(peers.port)
            assert time.monotonic() - began_s < DURATION_S, "the machine is too slow"
            assert long_term == old
            assert exporter.established(peers.port) == old + 5
            kept.request("GET", "/-/healthy")
            assert kept.getresponse().read()
    kept.close()
    with clock_set(-DAYS_S):
        eventually(lambda: abs(reconciled_s(exporter) - time.time()) < DAYS_S / 2)
        assert_counts(exporter, peers)


def reconciled_s(exporter: Exporter) -> float:
    return exporter.value("tcpexporter_last_reconcile_timestamp_seconds") or 0


# --- Restrictions of the kernel ---


@pytest.mark.parametrize("value", [0, 2, 1])  # the kernel does not permit a change from 1
def test_the_exporter_works_with_any_unprivileged_bpf_disabled(
    exporter: Exporter, peers: Peers, value: int
) -> None:
    """With any value the program is loaded, root is dropped and counts are right.

    CAP_BPF is kept only if the value is not 0 and this kernel requires it.
    """
    UNPRIVILEGED_BPF.write_text(str(value))
    is_kept = value != 0 and not Kernel().has(UNPRIVILEGED_MAPS)
    with Exporter("--source", "ebpf") as another:
        assert_root_is_dropped(another, kept=is_kept << privileges.CAP_BPF)
        assert_counts(another, peers)
    assert_counts(exporter, peers)


@pytest.mark.parametrize("level", ["integrity", "confidentiality"])
def test_the_exporter_works_under_lockdown(
    exporter: Exporter, peers: Peers, level: str
) -> None:
    """The exporter uses ebpf, although lockdown restricts BPF programs.

    Writing to securityfs has the effect of the kernel parameter:
    security/lockdown/lockdown.c. Level confidentiality refuses helpers that read at any
    address, Linux kernel commit 9d1f8be5cf42 ("bpf: Restrict bpf when kernel lockdown is in
    confidentiality mode") (in v5.4). Our program calls none of these; it reads through
    pointers whose type the verifier knows.
    """
    LOCKDOWN.write_text(level)
    assert f"[{level}]" in LOCKDOWN.read_text()
    assert may_read_kernel() is (level == "integrity")
    kernel = Kernel()
    assert all(kernel.has(each) for each in FEATURES if each.required)
    with Exporter() as another:
        assert another.value("tcpexporter_source_info", source="ebpf") == 1
        assert_counts(another, peers)
        _, complaints = another.stop()
    assert "because ebpf does not work" not in complaints
    assert_counts(exporter, peers)


def may_read_kernel() -> bool:
    """Return whether the kernel accepts a program that reads its memory at any address."""
    code = READ_KERNEL + RETURN_0
    with contextlib.suppress(OSError):
        os.close(program.load(code, Btf.of_kernel().function(program.TRACEPOINT)))
        return True
    return False
