# SPDX-License-Identifier: GPL-3.0-only
"""Measures all figures except those that compare several numbers of connections."""

import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from tests.benchmarks import empty_program, program_runs
from tests.benchmarks.churn import by_fin, by_rst, churn, listening
from tests.benchmarks.contenders import counted_by_tcpexporter
from tests.benchmarks.exporter import AS_PROMETHEUS, Scraper, running, values
from tests.benchmarks.figures import CONNECTIONS, TRACKED
from tests.benchmarks.hold import held
from tests.benchmarks.kernel import NO_RUNS, Program, bpf_stats, cpu_ns
from tests.benchmarks.plan import Plan
from tests.benchmarks.program_runs import (
    BATCH_CONNECTIONS,
    STATE_CHANGES,
    Attachable,
    batch_runs,
)
from tests.benchmarks.sizes import TOLERANCE
from tests.benchmarks.slot_readings import readings
from tests.support import Exporter, inside, new_netns

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Pause in which processes that have just started or ended finish their work."""

WARM_UP = 10
"""Scrapes before the first measured one."""

BATCHES = 65
"""Number of batches. A round of batches has 100,880 state changes: half of the connections
are closed by FIN, half by RST."""

IDLE_ATTEMPTS = 3
"""Attempts to measure idle CPU time. A missed event of any namespace causes a
reconciliation, and then the attempt is repeated."""

WARM_UP_CONNECTIONS = 5_003


@dataclass
class Samples:
    """All measured values."""

    by_figure: defaultdict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    tracked: int = 0
    """Tracked connections while scrapes were timed, with the scraper's own connection."""
    idle_reconciliations: int = 0
    """Reconciliations while idle."""
    state_changes: dict[str, int] = field(default_factory=dict)
    """Numbers of state changes in all event rounds, by kind."""

    def add(self, figure: str, sample: float) -> None:
        self.by_figure[figure].append(sample)


def measure(plan: Plan) -> Samples:
    """Measure all figures except those that compare several numbers of connections.

    Raises:
        RuntimeError: the exporter ends, or its count is wrong.
    """
    samples = Samples()
    for figure, took_s in readings():
        samples.add(figure, took_s)
    with new_netns() as netns, inside(netns):
        _starts_without_connections(samples, plan)
        with running("--source", "ebpf") as started, held(CONNECTIONS):
            _scrapes(samples, plan, started.exporter)
            _idle(samples, plan, started.exporter)
            _events(samples, plan, started.exporter)
        with program_runs.compared_programs() as programs, ExitStack() as stack:
            with program_runs.all_attached(programs.values()):
                stack.enter_context(held(CONNECTIONS))
            _compare_programs(samples, plan, programs)
            for source in ("sock_diag", "procfs"):
                _polling(samples, plan, source)
    _rates(samples, plan)
    return samples


def _starts_without_connections(samples: Samples, plan: Plan) -> None:
    log.info("starting %s times", plan.starts)
    for _ in range(plan.starts):
        with running("--source", "ebpf") as started:
            samples.add("ready_none_s", started.took_s)


def _scrapes(samples: Samples, plan: Plan, exporter: Exporter) -> None:
    """Time scrapes of each kind in turn, so that disturbances affect all kinds alike."""
    log.info("scraping %s times", plan.scrapes)
    with (
        running("--source", "ebpf") as later,
        Scraper(exporter.port) as scraper,
        Scraper(later.exporter.port) as seeded,
    ):
        samples.tracked = _warm_up(scraper)
        _warm_up(seeded)
        requests: Mapping[str, Callable[[], object]] = {
            "scrape_s": scraper.get,
            "scrape_prometheus_s": lambda: scraper.get(AS_PROMETHEUS),
            "scrape_seeded_s": seeded.get,
        }
        for _ in range(plan.scrapes):
            for figure, request in requests.items():
                samples.add(figure, _timed_s(request))


def _warm_up(scraper: Scraper) -> int:
    """Scrape `WARM_UP` times; return the number of tracked connections.

    Raises:
        RuntimeError: the count is wrong.
    """
    for _ in range(WARM_UP):
        page = scraper.get()
    error = counted_by_tcpexporter(page).error(TRACKED)
    if error > TOLERANCE * TRACKED:
        raise RuntimeError(f"/metrics is off by {error:.0f} of {TRACKED:,} sockets")
    return int(values(page)["tcpexporter_tracked_connections", ""])


def _timed_s(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def _idle(samples: Samples, plan: Plan, exporter: Exporter) -> None:
    log.info("measuring the idle exporter for %s s, after %s s", plan.idle_s, plan.settle_s)
    # The connection stays open, because opening another one would be an event.
    with Scraper(exporter.port) as scraper:
        scraper.get()
        time.sleep(plan.settle_s)
        for _ in range(IDLE_ATTEMPTS):
            before = scraper.reconciliations()
            cpu_ratio = _cpu_ratio(exporter, plan.idle_s)
            reconciliations = scraper.reconciliations() - before
            if not reconciliations:
                break
    samples.add("idle_cpu_ratio", cpu_ratio)
    samples.idle_reconciliations = reconciliations


def _cpu_ratio(exporter: Exporter, period_s: float) -> float:
    pid = exporter.process.pid
    start_ns, cpu_before_ns = time.monotonic_ns(), cpu_ns(pid)
    time.sleep(period_s)
    return (cpu_ns(pid) - cpu_before_ns) / (time.monotonic_ns() - start_ns)


def _events(samples: Samples, plan: Plan, exporter: Exporter) -> None:
    log.info("timing the BPF program in %s rounds", plan.event_rounds)
    program = Program.of_process(exporter.process.pid)
    total = NO_RUNS
    with listening() as listeners, bpf_stats():
        churn(listeners, WARM_UP_CONNECTIONS, by_fin)
        for _ in range(plan.event_rounds):
            by_ending = {by_fin: NO_RUNS, by_rst: NO_RUNS}
            for ending in (by_fin, by_rst) * BATCHES:
                by_ending[ending] += batch_runs(program, listeners, ending)
            both = by_ending[by_fin] + by_ending[by_rst]
            samples.add("event_ns", both.mean_ns)
            samples.add("event_fin_ns", by_ending[by_fin].mean_ns)
            samples.add("event_rst_ns", by_ending[by_rst].mean_ns)
            total += both
    connections = plan.event_rounds * BATCHES * BATCH_CONNECTIONS
    samples.state_changes = {
        "connections_by_fin": connections,
        "connections_by_rst": connections,
        "expected": connections * sum(STATE_CHANGES.values()),
        # Both ends enter and leave ESTABLISHED, whichever way they are closed.
        "expected_of_established": connections * len(STATE_CHANGES) * 4,
        "run": total.run_count,
        "missed": total.missed,
    }


def _compare_programs(
    samples: Samples, plan: Plan, programs: Mapping[str, Attachable]
) -> None:
    log.info("comparing BPF programs in %s rounds", plan.event_rounds)
    with listening() as listeners, bpf_stats():
        for _ in range(plan.event_rounds):
            for figure, ratio in program_runs.ratios(programs, listeners).items():
                samples.add(figure, ratio)


def _polling(samples: Samples, plan: Plan, source: str) -> None:
    log.info("polling with %s for %s s", source, plan.polling_idle_s)
    with running("--source", source) as started:
        time.sleep(SETTLE_S)
        samples.add(
            f"idle_cpu_{source}_ratio", _cpu_ratio(started.exporter, plan.polling_idle_s)
        )


def _rates(samples: Samples, plan: Plan) -> None:
    """Measure rates without a program, with an empty one and with ours, many times in turn.

    Other load on the machine changes a rate by more than all programs together. So each
    round is symmetric, and only neighbouring rates are compared.
    """
    log.info("opening and closing connections in %s rounds", plan.rate_rounds)
    with new_netns() as netns, inside(netns), listening() as listeners:
        for _ in range(plan.rate_rounds):
            without = [_rate_per_s(listeners, plan)]
            with_empty = [_rate_with_empty_per_s(listeners, plan)]
            with running("--source", "ebpf"):
                ours = [_rate_per_s(listeners, plan) for _ in range(2)]
            with_empty.append(_rate_with_empty_per_s(listeners, plan))
            without.append(_rate_per_s(listeners, plan))
            for none, empty, exporter in zip(without, with_empty, ours, strict=True):
                samples.add("rate_with_per_s", exporter)
                samples.add("rate_without_per_s", none)
                samples.add("rate_times", exporter / none)
                samples.add("rate_empty_times", empty / none)
                samples.add("rate_to_empty_times", exporter / empty)


def _rate_with_empty_per_s(listeners: Sequence[socket.socket], plan: Plan) -> float:
    with empty_program.attached():
        return _rate_per_s(listeners, plan)


def _rate_per_s(listeners: Sequence[socket.socket], plan: Plan) -> float:
    """Return the rate of the median batches, because other load disturbs some batches."""
    batch_s = {
        ending: median(
            _timed_s(partial(churn, listeners, BATCH_CONNECTIONS, ending))
            for _ in range(plan.rate_batches)
        )
        for ending in STATE_CHANGES
    }
    return len(STATE_CHANGES) * BATCH_CONNECTIONS / sum(batch_s.values())
