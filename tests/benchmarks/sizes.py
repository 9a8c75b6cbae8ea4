# SPDX-License-Identifier: GPL-3.0-only
"""Compares the counting methods while a number of sockets is held."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from tests.benchmarks import capacity, kernel
from tests.benchmarks.contenders import (
    Contender,
    Sample,
    Scraped,
    counted_by_tcpexporter,
    node_exporter,
    worker,
)
from tests.benchmarks.exporter import NoNumberError, Scraper, Started, running
from tests.benchmarks.hold import held
from tests.benchmarks.plan import Plan
from tests.benchmarks.worker import METHODS
from tests.support import inside, new_netns

log = logging.getLogger(__name__)

OURS = "ebpf"
POLLING = ("sock_diag", "procfs")
NODE_EXPORTER = "node_exporter"

DEFAULT_MAX_CONNECTIONS = 262_144
"""Default of --max-connections, which is also its minimum here."""

TOLERANCE = 0.01
"""Largest allowed error of a count, as a share of the sockets. Missed events cause small
errors. After a larger error the measurement would be of something else."""

POLL_S = 1.0
"""The default of --interval."""


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
            size.contenders += _side_by_side(watching, sockets, plan)
            size.kept = _kept(watching)
        _measure_preexisting(size, plan)
    return size


def _measure_preexisting(size: Size, plan: Plan) -> None:
    """Measure exporters that start when the sockets are already open."""
    with _recording_failure(size, "from start to ready"):
        for start in _starts(size.max_connections, plan):
            size.starts.append(start)
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


def _tracker(max_connections: int) -> AbstractContextManager[Started]:
    return running("--source", "ebpf", "--max-connections", str(max_connections))


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


def _side_by_side(started: Started, sockets: int, plan: Plan) -> Iterator[Measured]:
    """Let the methods count in turn, so that disturbances affect all of them alike."""
    with ExitStack() as stack:
        ours = _scraped(stack, OURS, started)
        turns = [_Turns(ours, sockets, plan)]
        for name, entered in _others(sockets).items():
            try:
                contender = stack.enter_context(entered())
            except NoNumberError as error:
                yield logged(Measured(name, why_not=str(error)))
            else:
                turns.append(_Turns(contender, sockets, plan))
        going = turns
        while going:
            going = [each for each in going if each.take()]
        for each in turns:
            yield logged(each.measured())


def _scraped(stack: ExitStack, name: str, started: Started) -> Scraped:
    scraper = stack.enter_context(Scraper(started.exporter.port))
    return Scraped(name, started.exporter.process.pid, scraper, counted_by_tcpexporter)


def _others(sockets: int) -> dict[str, Callable[[], AbstractContextManager[Contender]]]:
    def of_worker(name: str) -> Callable[[], AbstractContextManager[Contender]]:
        return lambda: worker(name, sockets)

    return {NODE_EXPORTER: node_exporter, **{name: of_worker(name) for name in METHODS}}


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
        with _tracker(max_connections) as started:
            start = Start(started.took_s, kernel.memory(started.exporter.process.pid))
        log.info("  ready after %.2f s", start.took_s)
        yield start
        if time.monotonic() > until_s:
            break


# --- Figures for the table of single figures ---


def figure_samples(sizes: Sequence[Size]) -> dict[str, list[float]]:
    """Return samples by the names in `figures.FIGURES`; sizes not measured have none."""
    by_sockets = {size.sockets: size for size in sizes if not size.why_not}
    samples: dict[str, list[float]] = {}
    if small := by_sockets.get(1_000):
        samples["resident_bytes"] = _resident_bytes(small)
    if million := by_sockets.get(1_000_000):
        samples["ready_million_s"] = [start.took_s for start in million.starts]
        samples["seeding_bytes"] = [start.memory.above_bytes for start in million.starts]
    full = [each.kept_full for each in by_sockets.values() if each.kept_full]
    if full:
        samples["kernel_bytes"] = [full[-1].total_bytes / full[-1].tracked]
    return samples


def _resident_bytes(size: Size) -> list[float]:
    """Return resident memory of exporters, started before and after the connections."""
    watching = size.contender(OURS)
    used = [watching.memory] if watching and watching.memory else []
    used += [start.memory for start in size.starts]
    return [each.resident_bytes for each in used]
