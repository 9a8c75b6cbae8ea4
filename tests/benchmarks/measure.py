# SPDX-License-Identifier: GPL-3.0-only
"""Takes the samples: the real command, real connections, a network namespace of its own."""

import contextlib
import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.benchmarks import contenders
from tests.benchmarks.churn import Ending, by_fin, by_rst, churn, listening
from tests.benchmarks.exporter import AS_PROMETHEUS, Scraper, running, started
from tests.benchmarks.figures import (
    CONNECTIONS,
    PORTS,
    STATE_CHANGES_BY_FIN,
    STATE_CHANGES_BY_RST,
)
from tests.benchmarks.hold import held
from tests.benchmarks.kernel import (
    Program,
    ProgramRuns,
    bpf_stats,
    cpu_ns,
    resident_bytes,
)
from tests.support import ESTABLISHED, Exporter, inside, new_netns

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""For what was started or ended before to be done with."""

WARM_UP = 10
"""Scrapes that are not measured."""

BATCHES = 65
BATCH_CONNECTIONS = 97
"""By FIN and again by RST: 100,880 state changes in a round of batches. A prime number, so
that no multiple of a table's size hides anything."""

ATTEMPTS = 20
"""To have the host's state changes to ourselves for a batch, which takes 5 ms."""

IDLE_ATTEMPTS = 3
"""To see nothing happen: an event that is missed anywhere on the host is something."""

WARM_UP_CONNECTIONS = 5_003

STATE_CHANGES: Mapping[Ending, int] = {
    by_fin: STATE_CHANGES_BY_FIN,
    by_rst: STATE_CHANGES_BY_RST,
}
NO_RUNS = ProgramRuns(0, 0, 0)

MISCOUNTED = CONNECTIONS // 100
"""Connections that a count may be off. Of the tracepoint's events some are missed, which
is no matter here: with more than these it is not known what was measured."""


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    starts: int
    scrapes: int
    polling_scrapes: int
    settle_s: float
    """Before nothing happens: longer than --reconcile-interval, so that it has found the
    tracker to be right, and not so long that the server closes an idle connection."""
    idle_s: float
    polling_s: float
    event_rounds: int
    rate_pairs: int
    rate_connections: int
    """By FIN and again by RST, a sample."""
    limit_s: int
    """For all of it, on a machine that is busy with other things."""


QUICK = Effort(
    starts=3,
    scrapes=101,
    polling_scrapes=31,
    settle_s=1,
    idle_s=10,
    polling_s=5,
    event_rounds=3,
    rate_pairs=3,
    rate_connections=10_007,
    limit_s=300,
)
FULL = Effort(
    starts=11,
    scrapes=503,
    polling_scrapes=101,
    settle_s=65,
    idle_s=60,
    polling_s=10,
    event_rounds=11,
    rate_pairs=17,
    rate_connections=20_011,
    limit_s=1_200,
)


@dataclass
class Samples:
    """All that was measured."""

    by_figure: defaultdict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    tracked: int = 0
    """While scrapes were timed, as the exporter has it; its scraper's connection is too."""
    idle_reconciliations: int = 0
    """While nothing happened."""
    state_changes: dict[str, int] = field(default_factory=dict)
    """How many there were in all event rounds."""

    def add(self, figure: str, sample: float) -> None:
        self.by_figure[figure].append(sample)


def measure(effort: Effort) -> Samples:
    """Everything, in one run.

    Raises:
        RuntimeError: what is measured does not do what it should.
    """
    samples = Samples()
    with new_netns() as netns, inside(netns):
        _starts(samples, effort, "ready_none_s")
        with running() as exporter, held(CONNECTIONS):
            _scrapes(samples, effort, exporter)
            _idle(samples, effort, exporter)
            _events(samples, effort, exporter)
        with held(CONNECTIONS):
            _starts(samples, effort, "ready_s")
            for source in ("sock_diag", "procfs"):
                _polling(samples, effort, source)
    _rates(samples, effort)
    return samples


def _starts(samples: Samples, effort: Effort, figure: str) -> None:
    log.info("starting %s times for %s", effort.starts, figure)
    for _ in range(effort.starts):
        with started() as (_, took_s):
            samples.add(figure, took_s)


def _scrapes(samples: Samples, effort: Effort, exporter: Exporter) -> None:
    """Every way to count, by turns: what disturbs one disturbs the others."""
    log.info("scraping %s times", effort.scrapes)
    with running() as later, Scraper(exporter) as scraper, Scraper(later) as seeded:
        samples.tracked = _warm_up(scraper)
        _warm_up(seeded)
        ways: Mapping[str, Callable[[], object]] = {
            "scrape_s": scraper.get,
            "scrape_prometheus_s": lambda: scraper.get(AS_PROMETHEUS),
            "scrape_seeded_s": seeded.get,
            "ss_s": contenders.by_ss,
            "split_s": contenders.by_split,
        }
        for _ in range(effort.scrapes):
            for figure, way in ways.items():
                samples.add(figure, _timed_s(way))
        published_bytes = scraper.values()["process_resident_memory_bytes", ""]
        samples.add("resident_published_bytes", published_bytes)
        samples.add("resident_bytes", resident_bytes(exporter.process.pid))
        samples.add("resident_seeded_bytes", resident_bytes(later.process.pid))


def _warm_up(scraper: Scraper) -> int:
    """Scrape until it is as fast as it gets; how many connections are tracked.

    Raises:
        RuntimeError: the ways to count do not come to the same.
    """
    for _ in range(WARM_UP):
        values = scraper.values()
    ways: Mapping[str, Mapping[int, float]] = {
        "/metrics": {port: values[ESTABLISHED, str(port)] for port in PORTS},
        "ss": contenders.by_ss(),
        "/proc/net/tcp": contenders.by_split(),
    }
    for way, counted in ways.items():
        off = sum(abs(counted[port] - CONNECTIONS // len(PORTS)) for port in PORTS)
        if off > MISCOUNTED:
            raise RuntimeError(f"{way} is off by {off:.0f} of {CONNECTIONS} connections")
    return int(values["tcpexporter_tracked_connections", ""])


def _timed_s(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def _idle(samples: Samples, effort: Effort, exporter: Exporter) -> None:
    log.info("doing nothing for %s s, after %s s", effort.idle_s, effort.settle_s)
    # Connected all the time: to connect and to close would be something that happens.
    with Scraper(exporter) as scraper:
        scraper.get()
        time.sleep(effort.settle_s)
        for _ in range(IDLE_ATTEMPTS):
            before = _reconciliations(scraper)
            cpu_ratio = _cpu_ratio(exporter, effort.idle_s)
            reconciliations = _reconciliations(scraper) - before
            if not reconciliations:
                break
    samples.add("idle_cpu_ratio", cpu_ratio)
    samples.idle_reconciliations = reconciliations


def _reconciliations(scraper: Scraper) -> int:
    return int(scraper.values()["tcpexporter_reconciliations_total", ""])


def _cpu_ratio(exporter: Exporter, period_s: float) -> float:
    pid = exporter.process.pid
    start_ns, cpu_before_ns = time.monotonic_ns(), cpu_ns(pid)
    time.sleep(period_s)
    return (cpu_ns(pid) - cpu_before_ns) / (time.monotonic_ns() - start_ns)


def _events(samples: Samples, effort: Effort, exporter: Exporter) -> None:
    log.info("timing the BPF program in %s rounds", effort.event_rounds)
    program = Program(exporter.process.pid)
    total = NO_RUNS
    with listening() as listeners, bpf_stats():
        churn(listeners, WARM_UP_CONNECTIONS, by_fin)
        for _ in range(effort.event_rounds):
            by_ending = {by_fin: NO_RUNS, by_rst: NO_RUNS}
            for ending in (by_fin, by_rst) * BATCHES:
                by_ending[ending] += _runs(program, listeners, ending)
            both = by_ending[by_fin] + by_ending[by_rst]
            samples.add("event_ns", both.mean_ns)
            samples.add("event_fin_ns", by_ending[by_fin].mean_ns)
            samples.add("event_rst_ns", by_ending[by_rst].mean_ns)
            total += both
    connections = effort.event_rounds * BATCHES * BATCH_CONNECTIONS
    samples.state_changes = {
        "connections_by_fin": connections,
        "connections_by_rst": connections,
        "expected": connections * sum(STATE_CHANGES.values()),
        # Both ends enter and leave ESTABLISHED, however they are closed.
        "expected_of_established": connections * len(STATE_CHANGES) * 4,
        "run": total.run_count,
        "missed": total.missed,
    }


def _runs(
    program: Program, listeners: Sequence[socket.socket], ending: Ending
) -> ProgramRuns:
    """Of one batch in which, if at all possible, no others' sockets changed state.

    The program runs for every namespace of the host, and where it has nothing to do it is
    soon done: that would flatter the mean.
    """
    for _ in range(ATTEMPTS):
        before = program.runs()
        churn(listeners, BATCH_CONNECTIONS, ending)
        runs = program.runs() - before
        if runs.run_count <= BATCH_CONNECTIONS * STATE_CHANGES[ending]:
            break
    return runs


def _polling(samples: Samples, effort: Effort, source: str) -> None:
    log.info("polling with %s for %s s", source, effort.polling_s)
    with running(source) as exporter:
        with Scraper(exporter) as scraper:
            _warm_up(scraper)
            until_s = time.monotonic() + effort.polling_s
            for _ in range(effort.polling_scrapes):
                if time.monotonic() > until_s:
                    break
                samples.add(f"scrape_{source}_s", _timed_s(scraper.get))
        time.sleep(SETTLE_S)
        samples.add(f"idle_cpu_{source}_ratio", _cpu_ratio(exporter, effort.polling_s))


def _rates(samples: Samples, effort: Effort) -> None:
    """With and without in pairs, each first in every other pair."""
    log.info("opening and closing connections in %s pairs", effort.rate_pairs)
    for number in range(effort.rate_pairs):
        order = [True, False] if number % 2 else [False, True]
        for with_exporter in order:
            _rate(samples, effort, with_exporter=with_exporter)


def _rate(samples: Samples, effort: Effort, *, with_exporter: bool) -> None:
    # A new namespace each time: no sample finds the sockets in TIME_WAIT of another.
    with contextlib.ExitStack() as stack:
        stack.enter_context(inside(stack.enter_context(new_netns())))
        if with_exporter:
            stack.enter_context(running())
        listeners = stack.enter_context(listening())
        time.sleep(SETTLE_S)
        start_s = time.perf_counter()
        for ending in STATE_CHANGES:
            churn(listeners, effort.rate_connections, ending)
        took_s = time.perf_counter() - start_s
    name = "rate_with_per_s" if with_exporter else "rate_without_per_s"
    samples.add(name, 2 * effort.rate_connections / took_s)
