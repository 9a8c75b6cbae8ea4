# SPDX-License-Identifier: GPL-3.0-only
"""Measures all figures except those that compare several numbers of connections."""

import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.benchmarks import empty_program
from tests.benchmarks.churn import Ending, by_fin, by_rst, churn, listening
from tests.benchmarks.contenders import counted_by_tcpexporter
from tests.benchmarks.exporter import AS_PROMETHEUS, Scraper, running, values
from tests.benchmarks.figures import (
    CONNECTIONS,
    STATE_CHANGES_BY_FIN,
    STATE_CHANGES_BY_RST,
    TRACKED,
)
from tests.benchmarks.hold import held
from tests.benchmarks.kernel import Program, ProgramRuns, bpf_stats, cpu_ns
from tests.benchmarks.plan import Plan
from tests.benchmarks.sizes import TOLERANCE
from tests.support import Exporter, inside, new_netns

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Pause in which processes that have just started or ended finish their work."""

WARM_UP = 10
"""Scrapes before the first measured one."""

BATCHES = 65
BATCH_CONNECTIONS = 97
"""Number of connections of a batch. A round of batches has 100,880 state changes: half
of the connections are closed by FIN, half by RST. The number is prime, so that it is no
multiple of a table's size."""

ATTEMPTS = 20
"""Attempts to measure a batch of 5 ms without state changes elsewhere on the host."""

IDLE_ATTEMPTS = 3
"""Attempts to measure idle CPU time. A missed event of any namespace causes a
reconciliation, and then the attempt is repeated."""

WARM_UP_CONNECTIONS = 5_003

STATE_CHANGES: Mapping[Ending, int] = {
    by_fin: STATE_CHANGES_BY_FIN,
    by_rst: STATE_CHANGES_BY_RST,
}
NO_RUNS = ProgramRuns(0, 0, 0)


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
    with new_netns() as netns, inside(netns):
        _starts_without_connections(samples, plan)
        with running("--source", "ebpf") as started, held(CONNECTIONS):
            _scrapes(samples, plan, started.exporter)
            _idle(samples, plan, started.exporter)
            _events(samples, plan, started.exporter)
        with held(CONNECTIONS):
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
            before = _reconciliations(scraper)
            cpu_ratio = _cpu_ratio(exporter, plan.idle_s)
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


def _events(samples: Samples, plan: Plan, exporter: Exporter) -> None:
    log.info("timing the BPF program in %s rounds", plan.event_rounds)
    program = Program(exporter.process.pid)
    total = NO_RUNS
    with listening() as listeners, bpf_stats():
        churn(listeners, WARM_UP_CONNECTIONS, by_fin)
        for _ in range(plan.event_rounds):
            by_ending = {by_fin: NO_RUNS, by_rst: NO_RUNS}
            for ending in (by_fin, by_rst) * BATCHES:
                by_ending[ending] += _runs(program, listeners, ending)
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


def _runs(
    program: Program, listeners: Sequence[socket.socket], ending: Ending
) -> ProgramRuns:
    """Measure one batch, if possible without state changes of other sockets on the host.

    The program runs for every network namespace. For other namespaces it returns early,
    which would lower the mean.
    """
    for _ in range(ATTEMPTS):
        before = program.runs()
        churn(listeners, BATCH_CONNECTIONS, ending)
        runs = program.runs() - before
        if runs.run_count <= BATCH_CONNECTIONS * STATE_CHANGES[ending]:
            break
    return runs


def _polling(samples: Samples, plan: Plan, source: str) -> None:
    log.info("polling with %s for %s s", source, plan.polling_idle_s)
    with running("--source", source) as started:
        time.sleep(SETTLE_S)
        samples.add(
            f"idle_cpu_{source}_ratio", _cpu_ratio(started.exporter, plan.polling_idle_s)
        )


def _rates(samples: Samples, plan: Plan) -> None:
    """Measure rates without a program, with ours and with an empty one, many times in turn.

    Other load on the machine changes a rate by more than all programs together.
    """
    log.info("opening and closing connections in %s rounds", plan.rate_rounds)
    with new_netns() as netns, inside(netns), listening() as listeners:
        for _ in range(plan.rate_rounds):
            before, with_empty = _rates_of_empty(listeners, plan)
            with running("--source", "ebpf"):
                ours = [_rate_per_s(listeners, plan) for _ in range(2)]
            after = _rate_per_s(listeners, plan)
            samples.add("rate_empty_times", with_empty / before)
            for with_it, without in zip(ours, (before, after), strict=True):
                samples.add("rate_with_per_s", with_it)
                samples.add("rate_without_per_s", without)
                samples.add("rate_times", with_it / without)


def _rates_of_empty(listeners: Sequence[socket.socket], plan: Plan) -> tuple[float, float]:
    """Return the rate without a program, and the mean of two with an empty program."""
    with empty_program.attached():
        first = _rate_per_s(listeners, plan)
    without = _rate_per_s(listeners, plan)
    with empty_program.attached():
        last = _rate_per_s(listeners, plan)
    return without, (first + last) / 2


def _rate_per_s(listeners: Sequence[socket.socket], plan: Plan) -> float:
    start_s = time.perf_counter()
    for ending in STATE_CHANGES:
        churn(listeners, plan.rate_connections, ending)
    took_s = time.perf_counter() - start_s
    return len(STATE_CHANGES) * plan.rate_connections / took_s
