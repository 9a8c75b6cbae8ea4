# SPDX-License-Identifier: GPL-3.0-only
"""A random walk: after any sequence of events, the exporter's counts equal those of ss(8).

Processes open and close connections at random, while the exporter is paused, stopped,
killed and started again. The counts are compared whenever the processes are quiet. They
must be equal at once if no event was missed. If the kernel has counted a missed event, they
must be equal after one more reconciliation. TCPEXPORTER_TEST_SEED=NUMBER repeats a walk.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Self

import pytest

from tests.kernel.helpers import ss_oracle as oracle
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.socket_worker import LISTENING
from tests.kernel.helpers.worker import Worker
from tests.support import ESTABLISHED, LONG_TERM, Exporter

OPERATIONS = 13_297
"""Number of operations of all processes in a walk."""

SEED_IN_CI = 1009

LISTENED = {port for ports in LISTENING for port in ports}

SETTINGS = (
    *("--source", "ebpf", "--duration", "0"),
    *("--reconcile-interval", "1", "--reconcile-cpu", "100"),
)


@pytest.fixture(autouse=True)
def few_ports(netns: str) -> None:
    """Restrict ephemeral ports, so that address pairs recur often and scrapes are short."""
    oracle.set_inside(netns, "/proc/sys/net/ipv4/ip_local_port_range", "50021 51019")


@pytest.fixture
def seed() -> int:
    """The seed of the walk: random, but always the same in CI."""
    chosen = random.SystemRandom().randrange(1_000_000)
    if os.environ.get("CI") == "true":
        chosen = SEED_IN_CI
    return int(os.environ.get("TCPEXPORTER_TEST_SEED", chosen))


class Walk:
    """Processes that hold sockets, and an exporter, with random events."""

    def __init__(self, seed: int, direction: str, effort: Effort) -> None:
        self.operations = 0
        self.compared = 0
        self.exact_at_once = 0
        """Number of comparisons that required equal counts without a reconciliation."""
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311  # noqa: S311  # repeatable
        self._direction = direction
        self._effort = effort
        self._workers = [_start_worker(index) for index in range(len(LISTENING))]
        self._start_exporter()

    def _start_exporter(self) -> None:
        self._exporter = Exporter("--direction", self._direction, *SETTINGS)
        self._missed_or_refused_before: float | None = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exporter.__exit__()
        for worker in self._workers:
            worker.kill()

    def go(self) -> None:
        """Cause each event a fixed number of times, in random order."""
        times = self._effort.times
        happenings = [
            *[(self.nothing, 0.0)] * times(7),
            *[(self.process_is_killed, 0.002)] * times(3),
            *[(self.exporter_pauses, 0.002)] * times(5),
            *[(self.exporter_ends, 0.017)] * times(2),
            *[(self.exporter_is_killed, 0.017)] * times(2),
            *[(self.exporter_is_absent, 0.0)] * times(2),
        ]
        self._random.shuffle(happenings)
        shares = len(happenings) * len(self._workers)
        self._operations_each = self._effort.of(OPERATIONS) // shares
        for number, (happening, longest_pause_s) in enumerate(happenings):
            done = self._step(happening, longest_pause_s)
            self.operations += len(done)
            if wrong := self._wrong():
                raise AssertionError(
                    f"seed {self._seed}, step {number}, {happening.__name__}: "
                    f"(shown, true) by port and version: {wrong}\n" + "\n".join(done)
                )

    def _step(self, happening: Callable[[], None], longest_pause_s: float) -> list[str]:
        """Cause an event while all processes are busy; return the operations of the
        processes."""
        self._longest_pause_s = longest_pause_s
        for worker in self._workers:
            self._make_busy(worker)
        happening()
        done = [
            f"process {index}: {operation}"
            for index, worker in enumerate(self._workers)
            for operation in worker.answer()
        ]
        if self._exporter.process.poll() is not None:
            self._start_exporter()
        return done

    def _make_busy(self, worker: Worker) -> None:
        worker.ask(
            seed=self._random.randrange(1 << 32),
            operations=self._operations_each,
            longest_pause_s=self._longest_pause_s,
            # If the opening of a connection was missed, only its listener shows its
            # direction.
            may_stop_listening=self._direction == "all",
        )

    def nothing(self) -> None:
        pass

    def exporter_pauses(self) -> None:
        self._exporter.process.send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(0, 0.2))
        self._exporter.process.send_signal(signal.SIGCONT)

    def exporter_ends(self) -> None:
        code, complaints = self._exporter.stop()
        assert code == 0, complaints
        self._start_exporter()

    def exporter_is_killed(self) -> None:
        self._exporter.__exit__()
        self._start_exporter()

    def exporter_is_absent(self) -> None:
        """Kill the exporter; `_step` starts it after the processes have stopped."""
        self._exporter.__exit__()

    def process_is_killed(self) -> None:
        """Kill a process with all its sockets, and start another one."""
        time.sleep(self._random.uniform(0, 0.1))
        index = self._random.randrange(len(self._workers))
        self._workers[index].kill()
        self._workers[index] = _start_worker(index)
        self._make_busy(self._workers[index])

    def _wrong(self) -> dict[str, dict[oracle.Series, tuple[int, int]]]:
        """Return the exporter's and the true counts where they differ."""
        self.compared += 1
        page, true = oracle.scrape_and_count(self._exporter)
        wrong = self._differences(page, true)
        if page.missed_or_refused == self._missed_or_refused_before:
            self.exact_at_once += 1
        elif wrong:
            page, true = oracle.scrape_reconciled(self._exporter)
            wrong = self._differences(page, true)
        self._missed_or_refused_before = page.missed_or_refused
        return wrong

    def _differences(
        self, page: oracle.Page, true: oracle.Counts
    ) -> dict[str, dict[oracle.Series, tuple[int, int]]]:
        if self._direction == "inbound":
            true = oracle.at_ports(true, LISTENED)
        return {
            name: wrong
            for name in (ESTABLISHED, LONG_TERM)
            if (wrong := oracle.difference(page.counts(name), true))
        }


def _start_worker(index: int) -> Worker:
    return Worker("tests.kernel.helpers.socket_worker", index)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "direction", ["all", pytest.param("inbound", marks=pytest.mark.any_kernel)]
)
def test_the_counts_equal_those_of_ss_after_any_events(
    seed: int, direction: str, effort: Effort
) -> None:
    """After thousands of operations on sockets the counts equal those of ss."""
    with Walk(seed, direction, effort) as walk:
        walk.go()
    sys.stdout.write(
        f"seed {seed}: {walk.operations} operations,"
        f" {walk.exact_at_once} of {walk.compared} comparisons without waiting\n"
    )
    assert walk.operations > effort.of(10_007)
