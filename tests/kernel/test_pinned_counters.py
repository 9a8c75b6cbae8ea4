# SPDX-License-Identifier: GPL-3.0-only
"""Counters continue when the exporter ends, is killed, or is replaced by another one."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tcpexporter.clock import boottime_ns
from tcpexporter.connections.record import KEY, Records
from tcpexporter.ebpf import libbpf, pins
from tcpexporter.ebpf.connection_array import WINDOW
from tcpexporter.ebpf.mapped_array import MappedArray
from tcpexporter.ebpf.pins import CONNECTIONS, CORRECTIONS, LAYOUT, LEDGER, LINK, WORDS
from tests.kernel.helpers.borrowed import KernelCounts
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.identities import (
    CLOSED,
    LIFETIMES,
    OPENED,
    Labels,
    by_labels,
    imbalance,
    total,
    violated,
)
from tests.kernel.helpers.ss_oracle import Page
from tests.kernel.helpers.worker import Worker
from tests.kernel.test_pins import (
    Timed,
    known,
    pin_layout,
    pinned,
    replace_pin,
    run_by_events,
    source,
)
from tests.kernel.test_slots import PORTS, keep_busy
from tests.support import ESTABLISHED, LONG_TERM, Exporter, Peers

OTHER_SERIES = "the settings count other series: counters begin at 0"
KILLS = 5
LIFE_S = 3.0
"""How long an exporter runs before it is killed."""

Counters = Counter[tuple[str, Labels]]
"""Values by name and labels."""


def close(peers: Peers, count: int) -> None:
    """Close the oldest connections."""
    for client, server in peers.pairs[:count]:
        client.close()
        server.close()
    del peers.pairs[:count]


def end(exporter: Exporter, how: signal.Signals) -> str:
    """End the exporter; return its log."""
    exporter.process.send_signal(how)
    _, log = exporter.process.communicate()
    assert exporter.process.returncode == (-how if how == signal.SIGKILL else 0)
    return log


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGTERM, marks=pytest.mark.any_kernel), signal.SIGKILL]
)
def test_counters_continue_with_the_next_run(directory: Path, how: signal.Signals) -> None:
    """They include what opens and closes while no exporter runs."""
    opened = closed = 0
    with Peers() as peers:
        peers.connect(7)  # before the first run
        for _ in range(3):
            with run_by_events(directory, "--histograms") as exporter:
                page = Page(exporter)
                series = {"port": str(peers.port), "tcp_version": "4"}
                assert page.value(OPENED, **series) == opened
                assert page.value(CLOSED, **series) == closed
                assert page.value(f"{LIFETIMES}_count", **series) == closed
                assert page.value(ESTABLISHED, **series) == len(peers.pairs)
                assert page.value("tcpexporter_pre_existing_connections") == 7
                assert not violated(page)
                peers.connect(101)
                close(peers, 23)
                assert exporter.value(OPENED, **series) == opened + 101
                assert exporter.value(CLOSED, **series) == closed + 23
                end(exporter, how)
            peers.connect(31)
            close(peers, 11)
            opened += 101 + 31
            closed += 23 + 11


def test_counters_continue_while_the_exporter_is_killed(
    directory: Path, effort: Effort
) -> None:
    """kill -9 every few seconds under load: no counter decreases, and they balance."""
    cpus = sorted(os.sched_getaffinity(0))
    stop = threading.Event()
    churned = [0] * len(PORTS)
    before: Counters = Counter()
    with contextlib.ExitStack() as running:
        threads = []
        for at, port in enumerate(PORTS):
            cpu = cpus[at % len(cpus)]
            worker = Worker("tests.kernel.helpers.churn_worker", cpu, port)
            running.callback(worker.kill)
            arguments = (worker, stop, churned, at)
            threads.append(threading.Thread(target=keep_busy, args=arguments))
        undo = running.enter_context(contextlib.ExitStack())
        exporter = undo.enter_context(run_by_events(directory))
        for thread in threads:
            thread.start()
            undo.callback(thread.join)
        undo.callback(stop.set)
        kills = effort.times(KILLS)
        for number in range(kills + 1):
            until_s = time.monotonic() + LIFE_S
            with KernelCounts.of(exporter.process.pid, buckets=0) as counts:
                while time.monotonic() < until_s:
                    began = counts.now()
                    page = Page(exporter)
                    changes = counts.now().changes_since(began)
                    assert abs(imbalance(page)) <= changes + counts.cpus
                    before = assert_no_counter_decreased(page, before)
            if number < kills:
                end(exporter, signal.SIGKILL)
                exporter = undo.enter_context(run_by_events(directory))
        stop.set()
        for thread in threads:
            thread.join()
        page = Page(exporter)
        assert imbalance(page) == 0
        assert_no_counter_decreased(page, before)
        # Each has two ends, and each end opens and closes, unless it is still open.
        connections = sum(churned) // 4
        counted = total(page, OPENED)
        sys.stdout.write(f"{counted} of about {connections} openings, {kills} kills\n")
        assert counted <= connections + total(page, ESTABLISHED)


def assert_no_counter_decreased(page: Page, before: Counters) -> Counters:
    """Compare the counters with those of an earlier page; return them."""
    now = Counter(
        {
            (name, labels): value
            for name in (OPENED, CLOSED)
            for labels, value in by_labels(page, name).items()
        }
    )
    assert not [each for each in before if now[each] < before[each]]
    return now


@pytest.mark.any_kernel
def test_another_label_set_begins_counters_at_0(directory: Path) -> None:
    """Ages are adopted, and the log says that the counters begin again."""
    with Peers() as peers:
        peers.connect(11)
        with run_by_events(directory, "--duration", "0") as exporter:
            peers.connect(7)
            close(peers, 3)
            assert exporter.value(OPENED, port=peers.port, tcp_version=4) == 7
            end(exporter, signal.SIGTERM)
        arguments = ("--direction", "all", "--labels", "port,remote_port,direction")
        with run_by_events(directory, *arguments, "--duration", "0") as exporter:
            series = {"port": str(peers.port), "remote_port": "", "direction": "inbound"}
            assert exporter.value(OPENED, **series) == 0
            assert exporter.value(CLOSED, **series) == 0
            assert exporter.value(ESTABLISHED, **series) == 15
            assert imbalance(Page(exporter)) == 0
            close(peers, 5)
            assert exporter.value(CLOSED, **series) == 5
            log = end(exporter, signal.SIGTERM)
        assert OTHER_SERIES in log
        assert "connections of the previous run" in log
        with run_by_events(directory, *arguments) as exporter:
            assert exporter.value(CLOSED, **series) == 5
            assert OTHER_SERIES not in end(exporter, signal.SIGTERM)


@pytest.mark.any_kernel
def test_other_buckets_begin_counters_at_0(directory: Path) -> None:
    """Lifetimes cannot be divided again; ages of open connections have the new bounds."""
    with Peers() as peers:
        series = {"port": peers.port, "tcp_version": 4}
        with run_by_events(directory, "--histograms", "--buckets", "1") as exporter:
            peers.connect(7)
            close(peers, 3)
            assert exporter.value(f"{LIFETIMES}_count", **series) == 3
            end(exporter, signal.SIGTERM)
        time.sleep(1.1)
        arguments = ("--histograms", "--buckets", "0.5", "--duration", "1")
        with run_by_events(directory, *arguments) as exporter:
            assert exporter.value(f"{LIFETIMES}_count", **series) == 0
            assert exporter.value(OPENED, **series) == 0
            assert exporter.value(LONG_TERM, **series) == 4
            assert not violated(Page(exporter))
            assert OTHER_SERIES in end(exporter, signal.SIGTERM)


OLD_CONNECTION = np.dtype(
    [
        ("established_ns", "u8"),
        ("handle", "u8"),
        ("key", KEY),
        ("group", "u4"),
        ("pad", "u4"),
    ]
)
"""``struct connection`` of version 0.2 and before."""

OLD_LAYOUT = (0x74637078, 64, 40, 0, 16, 56, 0, 16, 32, 36, 38)
"""Its layout: magic number, sizes, and the offsets of time, key, group and the key's
fields."""

OLD_IPV6 = 1 << 16
OLD_OUTBOUND = 1 << 17
"""Bits of ``group``; the lower ones are the local port."""


def pin_as_version_0_2(directory: Path, found: Records) -> None:
    """Replace the first generation by one that version 0.2 would have pinned.

    Its program is that of this version: it does not write to these maps.
    """
    records = np.zeros(len(found), OLD_CONNECTION)
    for name in ("established_ns", "handle", "key"):
        records[name] = found[name]
    is_ipv6 = found["key"]["local_address"][:, 11] != 0xFF
    records["group"] = found["key"]["local_port"]
    records["group"] |= np.where(is_ipv6, np.uint32(OLD_IPV6), np.uint32(0))
    records["group"] |= found["is_outbound"] * np.uint32(OLD_OUTBOUND)
    size, flags = OLD_CONNECTION.itemsize, 1 << 10
    array = libbpf.create_map(libbpf.BPF_MAP_TYPE_ARRAY, 4, size, entries=8191, flags=flags)
    mapped = MappedArray(array, OLD_CONNECTION, 8191, WINDOW)
    mapped.upto(len(records))[: len(records)] = records
    replace_pin(directory, CONNECTIONS, array)
    layout = np.zeros(16, np.uint32)
    layout[: len(OLD_LAYOUT)] = OLD_LAYOUT
    pin_layout(directory, layout)
    for name in (WORDS, LEDGER, CORRECTIONS):
        (directory / "1" / name).unlink()
    assert pinned(directory) == {f"1/{name}" for name in (CONNECTIONS, LAYOUT, LINK)}


def test_the_state_of_version_0_2_is_adopted(directory: Path) -> None:
    """An upgrade loses no age. It had no counters, so they begin at 0."""
    with Peers() as four, Peers("::1") as six:
        timed = Timed(four)
        timed.open(101)
        newer = Timed(six)
        newer.open(53)
        with source(directory) as opened:
            opened.start()
            found = np.concatenate([known(opened, each.port) for each in (four, six)])
        # The socket tables alone would show that these connections are younger.
        for client, server in itertools.chain(four.pairs, six.pairs):
            client.send(b"x")
            server.recv(1)
        moments = timed.moments | newer.moments
        for each in found:
            each["established_ns"] = sum(moments[int(each["key"]["remote_port"])]) // 2
        pin_as_version_0_2(directory, found)
        close(six, 5)
        before_ns = boottime_ns()
        with source(directory) as opened:
            opened.start()
            assert opened._pins
            assert opened._pins.adopted == 101 + 53
            timed.assert_known(known(opened, four.port))
            adopted = known(opened, six.port)
            assert len(adopted) == 48
            assert (adopted["established_ns"] < before_ns).all()
            ledger = opened.ledger()
            assert ledger.opened.sum() == 0
            # The maps of the previous version still had the inbound ends of 5 connections.
            assert ledger.closed.sum() == 5
            assert ledger.pre_existing.sum() == 2 * (101 + 48) + 5
            close(four, 7)
            assert opened.ledger().closed.sum() == 5 + 2 * 7
        with source(directory) as opened:
            opened.start()
            assert opened.ledger().closed.sum() == 5 + 2 * 7
        pins.remove(directory)
