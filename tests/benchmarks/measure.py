# SPDX-License-Identifier: GPL-3.0-only
"""Measures what takes one size only, in a network namespace of its own."""

import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.benchmarks import empty
from tests.benchmarks.churn import Ending, by_fin, by_rst, churn, listening
from tests.benchmarks.contenders import counted_by_us
from tests.benchmarks.effort import Effort
from tests.benchmarks.exporter import AS_PROMETHEUS, Scraper, running, values
from tests.benchmarks.figures import (
    CONNECTIONS,
    STATE_CHANGES_BY_FIN,
    STATE_CHANGES_BY_RST,
    TRACKED,
)
from tests.benchmarks.hold import held
from tests.benchmarks.kernel import Program, ProgramRuns, bpf_stats, cpu_ns
from tests.benchmarks.sizes import TOLERANCE
from tests.support import Exporter, inside, new_netns

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
    """All that takes one size only, in one run.

    Raises:
        RuntimeError: what is measured does not do what it should.
    """
    samples = Samples()
    with new_netns() as netns, inside(netns):
        _starts_with_none_there(samples, effort)
        with running("--source", "ebpf") as started, held(CONNECTIONS):
            _scrapes(samples, effort, started.exporter)
            _idle(samples, effort, started.exporter)
            _events(samples, effort, started.exporter)
        with held(CONNECTIONS):
            for source in ("sock_diag", "procfs"):
                _polling(samples, effort, source)
    _rates(samples, effort)
    return samples


def _starts_with_none_there(samples: Samples, effort: Effort) -> None:
    log.info("starting %s times", effort.starts)
    for _ in range(effort.starts):
        with running("--source", "ebpf") as started:
            samples.add("ready_none_s", started.took_s)


def _scrapes(samples: Samples, effort: Effort, exporter: Exporter) -> None:
    """By turns: what disturbs one disturbs the others."""
    log.info("scraping %s times", effort.scrapes)
    with (
        running("--source", "ebpf") as later,
        Scraper(exporter.port) as scraper,
        Scraper(later.exporter.port) as seeded,
    ):
        samples.tracked = _warm_up(scraper)
        _warm_up(seeded)
        ways: Mapping[str, Callable[[], object]] = {
            "scrape_s": scraper.get,
            "scrape_prometheus_s": lambda: scraper.get(AS_PROMETHEUS),
            "scrape_seeded_s": seeded.get,
        }
        for _ in range(effort.scrapes):
            for figure, way in ways.items():
                samples.add(figure, _timed_s(way))


def _warm_up(scraper: Scraper) -> int:
    """Scrape until it is as fast as it gets; how many connections are tracked.

    Raises:
        RuntimeError: not all are counted.
    """
    for _ in range(WARM_UP):
        page = scraper.get()
    off = counted_by_us(page).off(TRACKED)
    if off > TOLERANCE * TRACKED:
        raise RuntimeError(f"/metrics is off by {off:.0f} of {TRACKED:,} sockets")
    return int(values(page)["tcpexporter_tracked_connections", ""])


def _timed_s(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def _idle(samples: Samples, effort: Effort, exporter: Exporter) -> None:
    log.info("doing nothing for %s s, after %s s", effort.idle_s, effort.settle_s)
    # Connected all the time: to connect and to close would be something that happens.
    with Scraper(exporter.port) as scraper:
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
    log.info("polling with %s for %s s", source, effort.polling_idle_s)
    with running("--source", source) as started:
        time.sleep(SETTLE_S)
        samples.add(
            f"idle_cpu_{source}_ratio", _cpu_ratio(started.exporter, effort.polling_idle_s)
        )


def _rates(samples: Samples, effort: Effort) -> None:
    """With and without, and with an empty program, right after one another many times.

    What else a machine does makes a rate vary by more than all programs together.
    """
    log.info("opening and closing connections in %s rounds", effort.rate_rounds)
    with new_netns() as netns, inside(netns), listening() as listeners:
        for _ in range(effort.rate_rounds):
            before, with_empty = _rates_of_empty(listeners, effort)
            with running("--source", "ebpf"):
                ours = [_rate_per_s(listeners, effort) for _ in range(2)]
            after = _rate_per_s(listeners, effort)
            samples.add("rate_empty_times", with_empty / before)
            for with_it, without in zip(ours, (before, after), strict=True):
                samples.add("rate_with_per_s", with_it)
                samples.add("rate_without_per_s", without)
                samples.add("rate_times", with_it / without)


def _rates_of_empty(
    listeners: Sequence[socket.socket], effort: Effort
) -> tuple[float, float]:
    """The rates without any program, and with an empty one before and after that."""
    with empty.attached():
        first = _rate_per_s(listeners, effort)
    without = _rate_per_s(listeners, effort)
    with empty.attached():
        last = _rate_per_s(listeners, effort)
    return without, (first + last) / 2


def _rate_per_s(listeners: Sequence[socket.socket], effort: Effort) -> float:
    start_s = time.perf_counter()
    for ending in STATE_CHANGES:
        churn(listeners, effort.rate_connections, ending)
    took_s = time.perf_counter() - start_s
    return len(STATE_CHANGES) * effort.rate_connections / took_s
