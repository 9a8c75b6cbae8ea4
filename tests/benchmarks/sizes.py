# SPDX-License-Identifier: GPL-3.0-only
"""Compares the counting methods while a number of sockets is held."""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from tcpexporter.config.rules import MOST_RULES
from tests.benchmarks import capacity, kernel
from tests.benchmarks.contenders import (
    Contender,
    Sample,
    Scraped,
    counted_by_tcpexporter,
    node_exporter,
    worker,
)
from tests.benchmarks.exporter import (
    NoNumberError,
    Scraper,
    Started,
    pin_directory,
    running,
    wait_for_reconciliation,
)
from tests.benchmarks.hold import held
from tests.benchmarks.plan import Plan
from tests.benchmarks.worker import METHODS
from tests.support import inside, new_netns

log = logging.getLogger(__name__)

OURS = "ebpf"
NETNS_ALL = "netns_all"
"""The same with --netns all."""

WITHOUT_CLIENTS = "without_clients"
"""The same with --clients=false."""

WITH_RULES = "with_rules"
"""The same with as many rules of --expect as are allowed."""

EXPECTED = [
    word
    for number in range(MOST_RULES)
    for word in (
        "--expect",
        f"r{number}=remote=127.0.0.0/8:{1 + number}-65535,local=127.0.0.0/8:1-65535",
    )
]
"""Rules that match nearly all connections, so that no condition excludes most of them."""

POLLING = ("sock_diag", "procfs")
NODE_EXPORTER = "node_exporter"
DUMP_INFO = "dump_info"

DEFAULT_MAX_CONNECTIONS = 262_144
"""Default of --max-connections, which is also its minimum here."""

FREE_S = 1.5e-6
"""Seconds that the kernel requires to free the maps of a connection, and more."""

TOLERANCE = 0.01
"""Largest allowed error of a count, as a share of the sockets. Missed events cause small
errors. After a larger error the measurement would be of something else."""

POLL_S = 1.0
"""The default of --interval."""

ADOPTED = " connections of the previous run"
"""Part of the message of an exporter that has adopted pinned state."""


@dataclass
class Measured:
    """The measurements of one method at one size."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """CPU time of each count. For a polling source there is one value: the mean of
    several counts, one second apart."""
    memory: kernel.Memory | None = None
    """Memory of the process after counting."""
    why_not: str = ""
    """The reason why there are no samples; empty if there are. It follows "not measured,
    because"."""


@dataclass(frozen=True)
class Start:
    """A start of an exporter when all connections were already open."""

    took_s: float
    memory: kernel.Memory
    settled: kernel.Memory
    """Memory after the first reconciliation, which follows the start."""

    @property
    def above_settled_bytes(self) -> int:
        """The peak until the exporter was ready, above the resident memory afterwards."""
        return max(self.memory.peak_bytes - self.settled.resident_bytes, 0)


@dataclass(frozen=True)
class Kept:
    """The kernel memory of an exporter's maps."""

    tracked: int
    max_connections: int
    maps: Sequence[kernel.Map]

    @property
    def total_bytes(self) -> int:
        return sum(each.memlock for each in self.maps)


@dataclass
class Size:
    """All measurements with one number of sockets."""

    sockets: int
    why_not: str = ""
    """The reason why there are none; empty if there are. It follows "not measured,
    because"."""
    opening_s: float = 0.0
    max_connections: int = 0
    contenders: list[Measured] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    adoptions: list[Start] = field(default_factory=list)
    """Starts that adopted the pinned state of the previous exporter."""
    kept: Kept | None = None
    """Kernel memory with `max_connections` of this size."""
    kept_full: Kept | None = None
    """Kernel memory with full maps: --max-connections is the number of sockets."""
    missing: list[str] = field(default_factory=list)
    """A sentence for each other measurement that was not possible."""

    def contender(self, name: str) -> Measured | None:
        return next((each for each in self.contenders if each.name == name), None)


def measure_size(sockets: int, plan: Plan) -> Size:
    """Measure everything with this many sockets, in a new network namespace."""
    size = Size(sockets, max_connections=max(DEFAULT_MAX_CONNECTIONS, 2 * sockets))
    size.why_not = capacity.shortage(sockets)
    if size.why_not:
        log.info("%s sockets: not measured, because %s", f"{sockets:,}", size.why_not)
        return size
    with new_netns() as netns, inside(netns), ExitStack() as stack:
        # This exporter starts before the connections open, and ends before they close.
        with _tracker(size.max_connections) as watching:
            start_s = time.perf_counter()
            stack.enter_context(held(sockets // 2))
            size.opening_s = time.perf_counter() - start_s
            log.info("%s sockets: opened in %.1f s", f"{sockets:,}", size.opening_s)
            size.contenders += _side_by_side(watching, size, plan)
            size.kept = _kept(watching)
        _measure_preexisting(size, plan)
    return size


def _measure_preexisting(size: Size, plan: Plan) -> None:
    """Measure exporters that start when the sockets are already open."""
    with _recording_failure(size, "from start to ready"):
        size.starts += _starts(size.max_connections, plan)
    with _recording_failure(size, "adopting pinned state"):
        size.adoptions += _adoptions(size.max_connections, plan)
    with (
        _recording_failure(size, "kernel memory with full maps"),
        _tracker(size.sockets) as full,
    ):
        size.kept_full = _kept(full)
    size.contenders += [_polling(source, size.sockets, plan) for source in POLLING]


@contextlib.contextmanager
def _recording_failure(size: Size, what: str) -> Iterator[None]:
    """Record in `Size.missing` why a measurement gives no number, and continue."""
    try:
        yield
    except NoNumberError as error:
        size.missing.append(f"{what} is not measured, because {error}")
        log.info("  %s", size.missing[-1])


def _tracker(max_connections: int, *arguments: str) -> AbstractContextManager[Started]:
    return running(
        "--source", "ebpf", "--max-connections", str(max_connections), *arguments
    )


def _kept(started: Started) -> Kept:
    pid = started.exporter.process.pid
    with Scraper(started.exporter.port) as scraper:
        shown = scraper.values()
    return Kept(
        tracked=int(shown["tcpexporter_tracked_connections", ""]),
        max_connections=int(shown["tcpexporter_max_connections", ""]),
        maps=kernel.maps(pid),
    )


# --- Methods count in turn, many times ---


class _Turns:
    """One method that counts in turn with others, until its samples or its time are used
    up."""

    def __init__(self, contender: Contender, sockets: int, plan: Plan) -> None:
        self._contender = contender
        self._sockets = sockets
        self._plan = plan
        self._samples: list[Sample] = []
        self._spent_s = 0.0
        self._why_not = ""

    def take(self) -> bool:
        """Count once; return whether the method should count again."""
        start_s = time.perf_counter()
        try:
            self._samples.append(checked(self._contender.sample(), self._sockets))
        except NoNumberError as error:
            self._why_not = str(error)
            return False
        self._spent_s += time.perf_counter() - start_s
        # The first sample only warms up.
        return (
            len(self._samples) <= self._plan.contender_samples
            and self._spent_s < self._plan.contender_s
        )

    def measured(self) -> Measured:
        if self._why_not:
            return Measured(self._contender.name, why_not=self._why_not)
        warm = self._samples[1:] or self._samples
        return Measured(
            self._contender.name,
            wall_s=[each.wall_s for each in warm],
            cpu_s=[each.cpu_s for each in warm],
            memory=self._contender.memory(),
        )


def checked(sample: Sample, sockets: int) -> Sample:
    """Return the sample if its count is right.

    Raises:
        NoNumberError: the count is wrong by more than `TOLERANCE`.
    """
    error = sample.count.error(sockets)
    if error > TOLERANCE * sockets:
        raise NoNumberError(f"its count was off by {error:,.0f} of {sockets:,}")
    return sample


def _side_by_side(started: Started, size: Size, plan: Plan) -> Iterator[Measured]:
    """Let the methods count in turn, so that disturbances affect all of them alike."""
    with ExitStack() as stack:
        ours = _scraped(stack, OURS, started)
        turns = [_Turns(ours, size.sockets, plan)]
        for name, entered in _others(size).items():
            try:
                contender = stack.enter_context(entered())
            except NoNumberError as error:
                yield logged(Measured(name, why_not=str(error)))
            else:
                turns.append(_Turns(contender, size.sockets, plan))
        going = turns
        while going:
            going = [each for each in going if each.take()]
        for each in turns:
            yield logged(each.measured())


def _scraped(stack: ExitStack, name: str, started: Started) -> Scraped:
    scraper = stack.enter_context(Scraper(started.exporter.port))
    return Scraped(name, started.exporter.process.pid, scraper, counted_by_tcpexporter)


def _others(size: Size) -> dict[str, Callable[[], AbstractContextManager[Contender]]]:
    def of_worker(name: str) -> Callable[[], AbstractContextManager[Contender]]:
        return lambda: worker(name, size.sockets)

    return {
        NETNS_ALL: lambda: _ours_with(NETNS_ALL, size, "--netns", "all"),
        WITHOUT_CLIENTS: lambda: _ours_with(WITHOUT_CLIENTS, size, "--clients=false"),
        WITH_RULES: lambda: _ours_with(WITH_RULES, size, *EXPECTED),
        NODE_EXPORTER: node_exporter,
        **{name: of_worker(name) for name in METHODS},
    }


@contextlib.contextmanager
def _ours_with(name: str, size: Size, *arguments: str) -> Iterator[Scraped]:
    """Run another exporter, with other settings."""
    with _tracker(size.max_connections, *arguments) as started, ExitStack() as stack:
        yield _scraped(stack, name, started)


def logged(measured: Measured) -> Measured:
    if measured.why_not:
        log.info("  %s: not measured, because %s", measured.name, measured.why_not)
    else:
        times_ms = sorted(1e3 * each for each in measured.wall_s)
        log.info(
            "  %s: %.3g ms (%s)", measured.name, times_ms[len(times_ms) // 2], len(times_ms)
        )
    return measured


# --- The polling sources, and starts ---


def _polling(source: str, sockets: int, plan: Plan) -> Measured:
    """Measure a polling source with one scrape a second, its polling interval."""
    try:
        with running("--source", source) as started, ExitStack() as stack:
            contender = _scraped(stack, source, started)
            checked(contender.sample(), sockets)
            return logged(_scraped_once_a_second(contender, started, plan))
    except NoNumberError as error:
        return logged(Measured(source, why_not=str(error)))


def _scraped_once_a_second(contender: Scraped, started: Started, plan: Plan) -> Measured:
    pid = started.exporter.process.pid
    measured = Measured(contender.name)
    start_s, cpu_before_ns = time.monotonic(), kernel.cpu_ns(pid)
    until_s = start_s + 2 * plan.polls * POLL_S
    while len(measured.wall_s) < plan.polls and time.monotonic() < until_s:
        measured.wall_s.append(contender.sample().wall_s)
        next_s = start_s + len(measured.wall_s) * POLL_S
        time.sleep(max(next_s - time.monotonic(), 0))
    cpu_s = (kernel.cpu_ns(pid) - cpu_before_ns) / 1e9
    measured.cpu_s.append(cpu_s / len(measured.wall_s))
    measured.memory = contender.memory()
    return measured


def _starts(max_connections: int, plan: Plan) -> Iterator[Start]:
    """Start exporters when all connections are already open."""
    until_s = time.monotonic() + plan.starts_s
    for _ in range(plan.starts):
        _wait_for_freed_maps(max_connections)
        with _tracker(max_connections) as started:
            start = _settled(started)
        log.info("  ready after %.2f s", start.took_s)
        yield start
        if time.monotonic() > until_s:
            break


def _adoptions(max_connections: int, plan: Plan) -> Iterator[Start]:
    """Start exporters, of which each but the first adopts the state of the previous one.

    Raises:
        RuntimeError: an exporter adopted nothing.
    """
    until_s = time.monotonic() + plan.starts_s
    with pin_directory() as path:
        with _tracker(max_connections, "--pin", str(path)):
            pass
        for _ in range(plan.adoptions):
            _wait_for_freed_maps(max_connections)
            with _tracker(max_connections, "--pin", str(path)) as started:
                start = _settled(started)
                _, messages = started.exporter.stop()
            if ADOPTED not in messages:
                raise RuntimeError(f"the exporter adopted nothing:\n{messages}")
            log.info("  ready after %.2f s, with adopted state", start.took_s)
            yield start
            if time.monotonic() > until_s:
                break


def _wait_for_freed_maps(max_connections: int) -> None:
    """Wait while the kernel frees the maps of the last exporter, in its worker threads."""
    time.sleep(max_connections * FREE_S)


def _settled(started: Started) -> Start:
    pid = started.exporter.process.pid
    memory = kernel.memory(pid)
    wait_for_reconciliation(started.exporter)
    return Start(started.took_s, memory, kernel.memory(pid))


# --- Figures for the table of single figures ---


def figure_samples(sizes: Sequence[Size]) -> dict[str, list[float]]:
    """Return samples by the names in `figures.FIGURES`; sizes not measured have none."""
    by_sockets = {size.sockets: size for size in sizes if not size.why_not}
    samples: dict[str, list[float]] = {}
    small, million = by_sockets.get(1_000), by_sockets.get(1_000_000)
    if middle := by_sockets.get(100_000):
        samples["rules_s"] = _added_by_rules_s(middle)
    if small:
        ours = _wall_s(small, OURS)
        samples["resident_bytes"] = _resident_bytes(small)
        samples["scrape_node_exporter_times"] = _ratios(ours, _wall_s(small, NODE_EXPORTER))
    if million:
        samples |= _samples_of_million(million)
    if small and million:
        for figure, name, with_small in (
            ("scrape_million_times", OURS, OURS),
            ("scrape_million_netns_all_times", NETNS_ALL, OURS),
            ("scrape_million_without_clients_times", WITHOUT_CLIENTS, WITHOUT_CLIENTS),
        ):
            samples[figure] = _ratios(_wall_s(million, name), _wall_s(small, with_small))
    full = [each.kept_full for each in by_sockets.values() if each.kept_full]
    if full:
        samples["kernel_bytes"] = [full[-1].total_bytes / full[-1].tracked]
    return samples


def _samples_of_million(million: Size) -> dict[str, list[float]]:
    """Return the samples of figures that only a million sockets have."""
    starts_s = [start.took_s for start in million.starts]
    adoptions_s = [start.took_s for start in million.adoptions]
    return {
        "rule_million_s": [each / MOST_RULES for each in _added_by_rules_s(million)],
        "resident_million_bytes": [
            start.settled.resident_bytes for start in million.starts
        ],
        "ready_million_s": starts_s,
        "ready_million_dumps_times": _ratios(starts_s, _wall_s(million, DUMP_INFO)),
        "seeding_bytes": [start.memory.above_bytes for start in million.starts],
        "adopting_million_times": _ratios(adoptions_s, starts_s),
        "adopting_bytes": [start.above_settled_bytes for start in million.adoptions],
    }


def _added_by_rules_s(size: Size) -> list[float]:
    """Return how much longer a scrape takes with rules; nothing if that is not measured."""
    without = _wall_s(size, OURS)
    if not without:
        return []
    return [each - statistics.median(without) for each in _wall_s(size, WITH_RULES)]


def _wall_s(size: Size, name: str) -> list[float]:
    measured = size.contender(name)
    return measured.wall_s if measured else []


def _ratios(samples: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return each sample, divided by the median of the others; nothing without others."""
    return [each / statistics.median(others) for each in samples] if others else []


def _resident_bytes(size: Size) -> list[float]:
    """Return resident memory of exporters, started before and after the connections."""
    watching = size.contender(OURS)
    used = [watching.memory] if watching and watching.memory else []
    used += [start.settled for start in size.starts]
    return [each.resident_bytes for each in used]
