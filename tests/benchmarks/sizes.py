# SPDX-License-Identifier: GPL-3.0-only
"""Measures side by side while a number of sockets is held, and what we take for them."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from tests.benchmarks import kernel, room
from tests.benchmarks.contenders import (
    Contender,
    Sample,
    Scraped,
    counted_by_us,
    node_exporter,
    worker,
)
from tests.benchmarks.effort import Effort
from tests.benchmarks.exporter import NoNumberError, Scraper, Started, running
from tests.benchmarks.hold import held
from tests.benchmarks.worker import WAYS
from tests.support import inside, new_netns

log = logging.getLogger(__name__)

OURS = "ebpf"
POLLING = ("sock_diag", "procfs")
NODE_EXPORTER = "node_exporter"

DEFAULT_MAX_CONNECTIONS = 262_144
"""What the exporter has room for unless told otherwise; there is room for two a socket."""

TOLERANCE = 0.01
"""Of the sockets, that a count may be off. Of the tracepoint's events some are missed,
which is no matter here: with more than these it is not known what was measured."""

POLL_S = 1.0
"""The default of --interval."""


@dataclass
class Measured:
    """What one contender took at one size."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """For each count; of one that polls: the mean of counts a second apart."""
    memory: kernel.Memory | None = None
    """When it has counted."""
    why_not: str = ""
    """A sentence that goes on from "not measured, because"."""


@dataclass(frozen=True)
class Start:
    """An exporter that was started with all connections there already."""

    took_s: float
    memory: kernel.Memory


@dataclass(frozen=True)
class Kept:
    """What the kernel keeps for an exporter."""

    tracked: int
    max_connections: int
    maps: Sequence[kernel.Map]

    @property
    def total_bytes(self) -> int:
        return sum(each.memlock for each in self.maps)


@dataclass
class Size:
    """All that was measured with that many sockets."""

    sockets: int
    why_not: str = ""
    """A sentence that goes on from "not measured, because"."""
    opening_s: float = 0.0
    max_connections: int = 0
    contenders: list[Measured] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    kept: Kept | None = None
    """With --max-connections as the size has it."""
    kept_full: Kept | None = None
    """With --max-connections for no more sockets than are held."""
    missing: list[str] = field(default_factory=list)
    """What else could not be measured, as sentences."""

    def contender(self, name: str) -> Measured | None:
        return next((each for each in self.contenders if each.name == name), None)


def measure_size(sockets: int, effort: Effort) -> Size:
    """Everything with that many sockets, in a network namespace of its own."""
    size = Size(sockets, max_connections=max(DEFAULT_MAX_CONNECTIONS, 2 * sockets))
    size.why_not = room.why_not(sockets)
    if size.why_not:
        log.info("%s sockets: not measured, because %s", f"{sockets:,}", size.why_not)
        return size
    with new_netns() as netns, inside(netns), ExitStack() as stack:
        # The exporter that is told of connections comes before them, and goes before
        # they do.
        with _tracker(size.max_connections) as watching:
            start_s = time.perf_counter()
            stack.enter_context(held(sockets // 2))
            size.opening_s = time.perf_counter() - start_s
            log.info("%s sockets: opened in %.1f s", f"{sockets:,}", size.opening_s)
            size.contenders += _side_by_side(watching, sockets, effort)
            size.kept = _kept(watching)
        _measure_older(size, effort)
    return size


def _measure_older(size: Size, effort: Effort) -> None:
    """Exporters that find the sockets there already."""
    with _noted(size, "from start to ready"):
        for start in _starts(size.max_connections, effort):
            size.starts.append(start)
    with _noted(size, "the kernel's share with full maps"), _tracker(size.sockets) as full:
        size.kept_full = _kept(full)
    size.contenders += [_polling(source, size.sockets, effort) for source in POLLING]


@contextlib.contextmanager
def _noted(size: Size, what: str) -> Iterator[None]:
    """Go on without what gives no number."""
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


# --- One count of each after another, again and again ---


class _Turns:
    """A contender that takes its turns until it has had its share."""

    def __init__(self, contender: Contender, sockets: int, effort: Effort) -> None:
        self._contender = contender
        self._sockets = sockets
        self._effort = effort
        self._samples: list[Sample] = []
        self._spent_s = 0.0
        self._why_not = ""

    def take(self) -> bool:
        """Count once; whether there is another turn."""
        start_s = time.perf_counter()
        try:
            self._samples.append(checked(self._contender.sample(), self._sockets))
        except NoNumberError as error:
            self._why_not = str(error)
            return False
        self._spent_s += time.perf_counter() - start_s
        # The first is to warm up.
        return (
            len(self._samples) <= self._effort.contender_samples
            and self._spent_s < self._effort.contender_s
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
    """The sample, if it says how many there are.

    Raises:
        NoNumberError: it is off.
    """
    off = sample.count.off(sockets)
    if off > TOLERANCE * sockets:
        raise NoNumberError(f"its count was off by {off:,.0f} of {sockets:,}")
    return sample


def _side_by_side(started: Started, sockets: int, effort: Effort) -> Iterator[Measured]:
    """By turns: what disturbs one disturbs the others."""
    with ExitStack() as stack:
        ours = _scraped(stack, OURS, started)
        turns = [_Turns(ours, sockets, effort)]
        for name, entered in _others(sockets).items():
            try:
                contender = stack.enter_context(entered())
            except NoNumberError as error:
                yield logged(Measured(name, why_not=str(error)))
            else:
                turns.append(_Turns(contender, sockets, effort))
        going = turns
        while going:
            going = [each for each in going if each.take()]
        for each in turns:
            yield logged(each.measured())


def _scraped(stack: ExitStack, name: str, started: Started) -> Scraped:
    scraper = stack.enter_context(Scraper(started.exporter.port))
    return Scraped(name, started.exporter.process.pid, scraper, counted_by_us)


def _others(sockets: int) -> dict[str, Callable[[], AbstractContextManager[Contender]]]:
    def of_worker(name: str) -> Callable[[], AbstractContextManager[Contender]]:
        return lambda: worker(name, sockets)

    return {NODE_EXPORTER: node_exporter, **{name: of_worker(name) for name in WAYS}}


def logged(measured: Measured) -> Measured:
    if measured.why_not:
        log.info("  %s: not measured, because %s", measured.name, measured.why_not)
    else:
        times_ms = sorted(1e3 * each for each in measured.wall_s)
        log.info(
            "  %s: %.3g ms (%s)", measured.name, times_ms[len(times_ms) // 2], len(times_ms)
        )
    return measured


# --- Our own other ways to be ---


def _polling(source: str, sockets: int, effort: Effort) -> Measured:
    """Scraped once in every second in which it polls once."""
    try:
        with running("--source", source) as started, ExitStack() as stack:
            contender = _scraped(stack, source, started)
            checked(contender.sample(), sockets)
            return logged(_scraped_once_a_second(contender, started, effort))
    except NoNumberError as error:
        return logged(Measured(source, why_not=str(error)))


def _scraped_once_a_second(
    contender: Scraped, started: Started, effort: Effort
) -> Measured:
    pid = started.exporter.process.pid
    measured = Measured(contender.name)
    start_s, cpu_before_ns = time.monotonic(), kernel.cpu_ns(pid)
    until_s = start_s + 2 * effort.polls * POLL_S
    while len(measured.wall_s) < effort.polls and time.monotonic() < until_s:
        measured.wall_s.append(contender.sample().wall_s)
        next_s = start_s + len(measured.wall_s) * POLL_S
        time.sleep(max(next_s - time.monotonic(), 0))
    cpu_s = (kernel.cpu_ns(pid) - cpu_before_ns) / 1e9
    measured.cpu_s.append(cpu_s / len(measured.wall_s))
    measured.memory = contender.memory()
    return measured


def _starts(max_connections: int, effort: Effort) -> Iterator[Start]:
    """With the connections there already."""
    until_s = time.monotonic() + effort.starts_s
    for _ in range(effort.starts):
        with _tracker(max_connections) as started:
            start = Start(started.took_s, kernel.memory(started.exporter.process.pid))
        log.info("  ready after %.2f s", start.took_s)
        yield start
        if time.monotonic() > until_s:
            break


# --- What of it is a figure of its own ---


def figure_samples(sizes: Sequence[Size]) -> dict[str, list[float]]:
    """By name in `figures.FIGURES`; of sizes that were not measured there are none."""
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
    """Of those that were told of the connections, and of those that found them."""
    watching = size.contender(OURS)
    used = [watching.memory] if watching and watching.memory else []
    used += [start.memory for start in size.starts]
    return [each.resident_bytes for each in used]
