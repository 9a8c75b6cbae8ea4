# SPDX-License-Identifier: GPL-3.0-only
"""A soak test: connections open and close so fast that the kernel misses events.

    python -m tests.kernel.churn [--changes NUMBER] [--least SECONDS] [--most SECONDS]
                                 [--lose NUMBER]

The kernel skips a BPF program in an interrupt of the same program. To make this frequent,
the test steers packets over two CPUs, so that packets of one CPU interrupt the other. At
the end no connection opens or closes, and the exporter reconciles once more. Its counts
must then equal those of ss(8), and its memory must not have grown.

At each scrape the counters of opened and closed connections agree with the gauge of open
ones, except for events during the scrape. No counter decreases. The exporter publishes how
many of its counts may be wrong. A comparison with ss(8), before and after the scrape, never
finds more errors. --lose NUMBER makes the program ignore one in NUMBER events, at random.
"""

import argparse
import contextlib
import http.client
import itertools
import math
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.samples import Sample

from tests.kernel.helpers import ss_oracle as oracle
from tests.kernel.helpers.borrowed import KernelCounts, Moment
from tests.kernel.helpers.churn_worker import MOST_DESCRIPTORS
from tests.kernel.helpers.differences import explain
from tests.kernel.helpers.identities import imbalance
from tests.kernel.helpers.memory_growth import Growth, Memory, memory_of
from tests.kernel.helpers.ss_oracle import Page
from tests.kernel.helpers.worker import Worker
from tests.support import Exporter, inside, new_netns

PORTS = (10007, 10009, 10037, 10039)
"""Local ports of the processes. Each process has its own port; every second one runs on
the second CPU."""

MOST_SOCKETS = len(PORTS) * MOST_DESCRIPTORS

CONNECTIONS = 499
"""Number of connections that a process opens for each request."""

LOSING = """
import functools
from tcpexporter.__main__ import main
from tcpexporter import request
request.Request = functools.partial(request.Request, lose_one_in={})
main()
"""
"""Runs an exporter whose program ignores some events."""

LONG_S = 500
"""Minimum duration: in a shorter run, memory used for the first time looks like growth."""


@dataclass(frozen=True)
class Figures:
    """The result of a soak."""

    changes: int
    """How many times sockets entered or left ESTABLISHED."""
    seconds: float
    has_missed: bool
    """Whether the kernel missed events."""
    missed: int | None
    """Number of missed events; None if this kernel does not count them."""
    corrected_open: int
    corrected_close: int
    wrong_at_first: int
    """Sum of the errors of all counts at the quiet points, before a reconciliation."""
    wrong: int
    """Sum of the errors at the end, after at most one reconciliation."""
    quiet_points: int
    """Number of quiet points, including the end: the processes stop and counts are
    compared."""
    differences: Sequence[str]
    """A description of each quiet point that was still wrong after a reconciliation."""
    scrapes: int
    complaints: Sequence[str]
    """Number of scrapes that failed or had impossible values."""
    least_margin: int
    """The least difference between the bound of the errors and the errors."""
    most_unbalanced: int
    """The largest imbalance of the counters, because of events during a scrape."""
    straddling: int
    """Number of scrapes during which a reconciliation added and removed a connection."""
    memory: Memory
    """Memory at the last scrape."""
    growth: Growth
    """Growth of the process's own memory, without mapped files and maps."""

    @property
    def problems(self) -> list[str]:
        """List the reasons why the exporter or this test failed."""
        problems = [*self.complaints, *self.differences]
        if not self.has_missed:
            problems.append("no event was missed: increase --changes")
        if self.wrong:
            problems.append(f"{self.wrong} connections are wrong after reconciling")
        if self.seconds >= LONG_S and self.growth.is_more_than_noise:
            problems.append(f"its memory grows: {self.growth}")
        return problems

    def __str__(self) -> str:
        rows = {
            "state changes": f"{self.changes:,}",
            "seconds": f"{self.seconds:.1f}",
            "events missed": "not counted" if self.missed is None else f"{self.missed:,}",
            "corrected, opening missed": f"{self.corrected_open:,}",
            "corrected, closing missed": f"{self.corrected_close:,}",
            "wrong at quiet points": f"{self.wrong_at_first:,}",
            "wrong at the end": f"{self.wrong:,}",
            "quiet points": f"{self.quiet_points:,}",
            "of these, still wrong after reconciling": f"{len(self.differences):,}",
            "scrapes": f"{self.scrapes:,}",
            "failed or impossible scrapes": f"{len(self.complaints):,}",
            "largest imbalance of the counters": f"{self.most_unbalanced:,}",
            "scrapes during a correction": f"{self.straddling:,}",
            "least margin of the uncertainty": f"{self.least_margin:,}",
            "its own memory at the end, MiB": f"{self.memory.own_mib:.1f}",
            "mapped files and maps, MiB": f"{self.memory.mapped_mib:.1f}",
            "growth, last third": f"{self.growth.grown_mib:+.2f} MiB",
            "noise, middle third": f"{self.growth.noise_mib:.2f} MiB",
        }
        return "".join(f"{name:36}{value:>12}\n" for name, value in rows.items())


class Watcher(threading.Thread):
    """Scrapes continuously, and records failures and impossible values."""

    def __init__(self, exporter: Exporter, counts: KernelCounts) -> None:
        super().__init__(daemon=True)
        self.page = Page(exporter)
        """The last exposition."""
        self.scrapes = 0
        self.complaints: list[str] = []
        self.memory: list[Memory] = []
        """Memory after each scrape."""
        self.least_margin = sys.maxsize
        self.most_unbalanced = 0
        self.straddling = 0
        """As in `Figures`."""
        self._exporter = exporter
        self._counts = counts
        self._previous = counts.now()
        self._counters: dict[tuple[str, str], float] = {}
        self._ending = threading.Event()
        self._may_scrape = threading.Event()
        self._may_scrape.set()
        self._is_idle = threading.Event()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not scrape during the block."""
        self._is_idle.clear()
        self._may_scrape.clear()
        self._is_idle.wait()
        yield
        self._may_scrape.set()

    def run(self) -> None:
        while not self._ending.is_set():
            if not self._may_scrape.is_set():
                self._is_idle.set()
                self._may_scrape.wait()
            self.scrapes += 1
            try:
                wrong = ", ".join(self._scrape())
            except (AssertionError, OSError, http.client.HTTPException) as error:
                self.complaints.append(f"scrape {self.scrapes}: {error!r}")
            else:
                self.memory.append(memory_of(self._exporter.process.pid))
                if wrong:
                    self.complaints.append(f"scrape {self.scrapes}: {wrong}")

    def end(self) -> None:
        self._ending.set()
        self.join()

    def _scrape(self) -> list[str]:
        """Scrape once; return what is wrong."""
        first = self._counts.now()
        before = oracle.established()
        began = self._counts.now()
        self.page = Page(self._exporter)
        ended = self._counts.now()
        after = oracle.established()
        last = self._counts.now()
        wrong = [*self._impossible_values(self.page, ended)]
        wrong += self._unbalanced(self.page, began, ended)
        shown = [
            oracle.count(oracle.of_others(each, self._exporter)) for each in (before, after)
        ]
        wrong += self._too_certain(self.page, shown, last.changes_since(first))
        self._previous = began
        return wrong

    def _unbalanced(self, page: Page, began: Moment, ended: Moment) -> Iterator[str]:
        """Check the identity of the counters, except for changes during the scrape."""
        found = abs(imbalance(page))
        self.most_unbalanced = max(self.most_unbalanced, found)
        # A run of the program counts its event last, and each CPU has at most one run.
        if found > ended.changes_since(began) + self._counts.cpus:
            # A reconciliation added a connection that had closed shortly before, and
            # removed it. Until then it was counted, but not as opened.
            self.straddling += 1
            most = ended.changes_since(self._previous) + self._counts.cpus
            if found > most:
                yield f"the counters differ by {found} after {most} changes"

    def _too_certain(
        self, page: Page, shown: Sequence[oracle.Counts], changes: int
    ) -> Iterator[str]:
        """Check that the errors exceed the published bound by at most these changes."""
        counts = page.counts()
        before, after = shown
        error = 0
        for series in {*counts, *before, *after}:
            least, most = sorted((before[series], after[series]))
            error += max(counts[series] - most, least - counts[series], 0)
        bound = page.uncertain + changes
        self.least_margin = min(self.least_margin, bound - error)
        if error > bound:
            yield f"{error} connections are wrong, and {bound} may be"

    def _impossible_values(self, page: Page, moment: Moment) -> Iterator[str]:
        for family in page.families:
            for sample in family.samples:
                if sample.value < 0 or not math.isfinite(sample.value):
                    yield f"impossible value: {sample}"
                if family.type == "counter":
                    yield from self._backwards(sample)
        # A socket whose closing was missed is counted until a reconciliation removes it.
        unseen = math.inf if page.missed is None else moment.unseen
        most = MOST_SOCKETS + unseen
        for series, number in page.counts().items():
            if number > most:
                yield f"more connections than exist: {number} at {series}"

    def _backwards(self, sample: Sample) -> Iterator[str]:
        series = sample.name, str(sorted(sample.labels.items()))
        before = self._counters.get(series, 0)
        if sample.value < before:
            yield f"counter decreased from {before}: {sample}"
        self._counters[series] = sample.value


def churn(
    netns: str,
    *,
    changes: int,
    most_s: float,
    least_s: float = 0,
    quiet_s: float = math.inf,
    steer: bool = True,
    lose_one_in: int = 0,
) -> Figures:
    """Open and close connections in a namespace while an exporter is scraped.

    Args:
        netns: the name of the namespace.
        changes: the minimum number of changes; more if no event was missed by then.
        most_s: the maximum duration.
        least_s: the minimum duration.
        quiet_s: seconds between two quiet points.
        steer: whether packets are steered over two CPUs.
        lose_one_in: the program ignores one in this number of events; 0: none.
    """
    cpus = sorted(os.sched_getaffinity(0))[:2]
    oracle.set_inside(netns, "/proc/sys/net/ipv4/ip_local_port_range", "50021 51019")
    if steer:
        mask = sum(1 << cpu for cpu in cpus)
        oracle.set_inside(netns, "/sys/class/net/lo/queues/rx-0/rps_cpus", f"{mask:x}")
    with contextlib.ExitStack() as running:
        exporter = running.enter_context(
            Exporter(
                *("--source", "ebpf", "--direction", "all"),
                command=(sys.executable, "-c", LOSING.format(lose_one_in)),
            )
        )
        counts = running.enter_context(KernelCounts.of(exporter.process.pid, buckets=0))
        workers = []
        for number, port in enumerate(PORTS):
            cpu = cpus[number % len(cpus)]
            workers.append(Worker("tests.kernel.helpers.churn_worker", cpu, port))
            running.callback(workers[-1].kill)
        watcher = Watcher(exporter, counts)
        watcher.start()
        began_s = time.monotonic()
        done, busy_s = 0, 0.0
        points: list[Point] = []
        has_ended = False
        while not has_ended:
            round_s = time.monotonic()

            def is_enough(more: int) -> bool:
                now_s = time.monotonic()
                nonlocal has_ended
                has_ended = (
                    done + more >= changes  # noqa: B023
                    and watcher.page.has_missed
                    and now_s > began_s + least_s
                ) or now_s > began_s + most_s
                return has_ended or now_s > round_s + quiet_s  # noqa: B023

            done += _make_busy(workers, is_enough)
            busy_s += time.monotonic() - round_s
            with watcher.paused():
                points.append(compare(exporter))
            if points[-1].difference:
                sys.stderr.write(f"{points[-1].difference}\n")
        watcher.end()
        return _judge(watcher, points, done, busy_s)


@dataclass(frozen=True)
class Point:
    """The comparison of counts at one quiet point."""

    page: Page
    wrong_at_first: int
    wrong: int
    """The sum of the errors after at most one reconciliation."""
    difference: str
    """The series that are then wrong, with their connections; empty if all are right."""
    complaints: Sequence[str]
    """Identities that do not hold."""


def compare(exporter: Exporter) -> Point:
    """Compare the counts with those of ss(8); if they differ, compare again after a
    reconciliation."""
    page, true = oracle.scrape_and_count(exporter)
    wrong_at_first = _wrong(page, true)
    complaints = []
    if imbalance(page):
        complaints.append(f"the counters differ by {imbalance(page)} at a quiet point")
    if wrong_at_first > page.uncertain:
        complaints.append(
            f"{wrong_at_first} connections are wrong, and {page.uncertain} may be"
        )
    if wrong_at_first:
        page, true = oracle.scrape_reconciled(exporter)
    differing = oracle.difference(page.counts(), true)
    lines = [
        f"{series} shows {shown} and should be {wanted}\n"
        f"{explain(exporter.process.pid, series[0])}"
        for series, (shown, wanted) in differing.items()
    ]
    if lines:
        after, true = oracle.scrape_and_count(exporter)
        lines.append(f"after a reconciliation the error is {_wrong(after, true)}")
    wrong = _wrong(page, true)
    return Point(page, wrong_at_first, wrong, "\n".join(lines), complaints)


def _make_busy(workers: Sequence[Worker], is_enough: Callable[[int], bool]) -> int:
    """Let the processes open and close connections until ``is_enough`` returns True;
    return the number of changes."""
    done = 0
    with selectors.DefaultSelector() as busy:
        for worker in workers:
            busy.register(worker.answers, selectors.EVENT_READ, worker)
            worker.ask(connections=CONNECTIONS)
        while busy.get_map():
            ready = busy.select(oracle.PATIENCE_S)
            assert ready, "no process responds"
            for each, _ in ready:
                worker = each.data
                done += worker.answer()
                if is_enough(done):
                    busy.unregister(worker.answers)
                else:
                    worker.ask(connections=CONNECTIONS)
    return done


def _judge(watcher: Watcher, points: Sequence[Point], done: int, busy_s: float) -> Figures:
    page = points[-1].page
    return Figures(
        changes=done,
        seconds=busy_s,
        has_missed=page.has_missed,
        missed=None if page.missed is None else int(page.missed),
        corrected_open=int(page.corrected("missed_open")),
        corrected_close=int(page.corrected("missed_close")),
        wrong_at_first=sum(each.wrong_at_first for each in points),
        wrong=points[-1].wrong,
        quiet_points=len(points),
        differences=[each.difference for each in points if each.difference],
        scrapes=watcher.scrapes,
        complaints=[
            *watcher.complaints,
            *itertools.chain.from_iterable(each.complaints for each in points),
        ],
        least_margin=watcher.least_margin,
        most_unbalanced=watcher.most_unbalanced,
        straddling=watcher.straddling,
        memory=watcher.memory[-1],
        growth=Growth.of([each.own_mib for each in watcher.memory]),
    )


def _wrong(page: Page, true: oracle.Counts) -> int:
    differing = oracle.difference(page.counts(), true).values()
    return sum(abs(shown - wanted) for shown, wanted in differing)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernel.churn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--changes", type=int, default=1_000_000)
    parser.add_argument("--least", type=float, default=600, dest="least_s")
    parser.add_argument("--most", type=float, default=900, dest="most_s")
    parser.add_argument("--quiet", type=float, default=60, dest="quiet_s")
    parser.add_argument("--lose", type=int, default=0, dest="lose_one_in")
    parser.add_argument("--steer", action=argparse.BooleanOptionalAction, default=True)
    chosen = parser.parse_args()
    with new_netns() as netns, inside(netns):
        figures = churn(netns, **vars(chosen))
    sys.stdout.write(str(figures))
    sys.exit("\n".join(figures.problems) or None)


if __name__ == "__main__":
    main()
