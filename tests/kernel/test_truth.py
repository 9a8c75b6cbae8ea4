# SPDX-License-Identifier: GPL-3.0-only
"""A random walk: after any sequence of events, the exporter's counts equal those of ss(8).

Processes open and close connections at random, while the exporter is paused, stopped,
killed and started again. The counts are compared whenever the processes are quiet. They
must be equal at once if no event was missed. If the kernel has counted a missed event, they
must be equal after one more reconciliation. TCPEXPORTER_TEST_SEED=NUMBER repeats a walk.

The clients are compared too: each address is a client, but an IPv6 /64 is one.

Two more exporters, with other labels, run during the whole walk. At each quiet point their
counters agree with their gauges, whatever was missed. What they count as opened and closed
is what the processes opened and closed.
"""

import contextlib
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Self

import pytest

from tests.kernel.helpers import ss_oracle as oracle
from tests.kernel.helpers.cgroups import new_cgroup
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.identities import CLOSED, OPENED, violated
from tests.kernel.helpers.socket_worker import LISTENING
from tests.kernel.helpers.worker import Worker
from tests.support import ESTABLISHED, LONG_TERM, Exporter

OPERATIONS = 13_297
"""Number of operations of all processes in a walk."""

SEED_IN_CI = 1009

LISTENED = {port for ports in LISTENING for port in ports}

SETTINGS = (
    *("--source", "ebpf", "--duration", "0", "--histograms"),
    *("--reconcile-interval", "1", "--reconcile-cpu", "100"),
    *("--expect", f"ports=local=:{min(LISTENED)}-{max(LISTENED)}"),
)

LABELS = (
    "auto",
    "port,tcp_version,direction",
    "tcp_version,port",
    "port,tcp_version,unit,container",
)
"""Label sets of the exporter that is stopped and started; each start has another one."""

EVERY_LABEL = "port,tcp_version,direction,remote_port"

EXPECTED = "tcp_expected_connections"

CLIENTS = "tcp_established_clients"
LONG_TERM_CLIENTS = "tcp_longterm_clients"

CONNECTED = re.compile(r".*: connect \d+ to (?P<address>\S+) (?P<port>\d+)$")
"""What a process reports when it has connected."""

Side = tuple[str, int, str]
"""A direction, the port of the listener, and the IP version."""


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
        self._others = contextlib.ExitStack()
        self._cgroups = [
            self._others.enter_context(new_cgroup(f"worker-{index}.service"))
            for index in range(len(LISTENING))
        ]
        self._workers = [self._start_worker(index) for index in range(len(LISTENING))]
        self._auditor, self._total = (
            self._others.enter_context(
                Exporter("--direction", "all", "--labels", labels, *SETTINGS)
            )
            for labels in (EVERY_LABEL, "none")
        )
        self._counted: dict[str, Counter[Side]] = {}
        self._missed_by_auditor: float | None = 0.0
        self._is_every_answer_known = True
        self.audited = 0
        """Number of quiet points at which opened and closed were compared."""
        self.compared_units = 0
        """Number of comparisons of the units, too."""
        self._start_exporter()

    def _start_worker(self, index: int) -> Worker:
        """Start a process whose sockets belong to a unit of their own."""
        worker = Worker("tests.kernel.helpers.socket_worker", index)
        procs = self._cgroups[index].directory / "cgroup.procs"
        procs.write_text(str(worker.process.pid))
        return worker

    def _start_exporter(self) -> None:
        labels = self._random.choice(LABELS)
        self._exporter = Exporter(
            "--direction", self._direction, "--labels", labels, *SETTINGS
        )
        self._missed_or_refused_before: float | None = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exporter.__exit__()
        for worker in self._workers:
            worker.kill()
        self._others.close()

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
            if complaints := self._audit(done):
                raise AssertionError(
                    f"seed {self._seed}, step {number}, {happening.__name__}:\n"
                    + "\n".join([*complaints, *done])
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
        self._is_every_answer_known = False
        index = self._random.randrange(len(self._workers))
        self._workers[index].kill()
        self._workers[index] = self._start_worker(index)
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
        listened = oracle.at_ports(true, LISTENED)
        if self._direction == "inbound":
            true = listened
        differences = {
            name: oracle.difference(page.counts(name), true)
            for name in (ESTABLISHED, LONG_TERM)
        }
        # A pre-existing connection counts as outbound if its listener has closed. So a
        # client of both directions counts twice, and so does one of a port with two units.
        if all(
            {"direction", "unit"}.isdisjoint(each.labels) for each in page.samples(CLIENTS)
        ):
            true_clients = clients_by_port(oracle.established())
            for name in (CLIENTS, LONG_TERM_CLIENTS):
                differences[name] = oracle.difference(
                    oracle.at_ports(page.counts(name), LISTENED),
                    oracle.at_ports(true_clients, LISTENED),
                )
        expected = page.value(EXPECTED, name="ports")
        if expected != listened.total():
            differences[EXPECTED] = {(0, "any"): (int(expected or 0), listened.total())}
        by_unit = units(page)
        if by_unit and self._direction == "all":
            self.compared_units += 1
            true_by_unit = oracle.by_unit()
            units_now = {each: (by_unit[each], true_by_unit[each]) for each in true_by_unit}
            differences["units"] = {
                (0, each): pair for each, pair in units_now.items() if pair[0] != pair[1]
            }
        return {name: wrong for name, wrong in differences.items() if wrong}

    def _audit(self, done: Sequence[str]) -> list[str]:
        """Return what is wrong with the counters; ``done`` has what the processes did."""
        complaints = []
        for exporter in (self._exporter, self._total, self._auditor):
            page, _ = oracle.scrape_and_count(exporter)
            complaints += violated(page)
            if exporter is not self._exporter and page.missed == 0:
                complaints += self._wrong_clients(page)
        true = sides(oracle.established())
        counted = {
            "opened": at_sides(page, OPENED),
            "closed": at_sides(page, CLOSED),
            "open": true,
        }
        before, self._counted = self._counted, counted
        missed_before, self._missed_by_auditor = self._missed_by_auditor, page.missed
        is_known, self._is_every_answer_known = self._is_every_answer_known, True
        # A listener that closes resets clients that have just connected.
        if is_known and before and page.missed == missed_before and not self._may_reset:
            self.audited += 1
            grown = {name: minus(counted[name], before[name]) for name in counted}
            opened = connected(done)
            closed = minus(opened, grown["open"])
            for name, expected in (("opened", opened), ("closed", closed)):
                if minus(grown[name], expected):
                    complaints.append(f"{name}: {grown[name]} instead of {expected}")
        return complaints

    def _wrong_clients(self, page: oracle.Page) -> list[str]:
        """Return what is wrong with the clients of an exporter that counts all sides."""
        ends = oracle.established()
        if any("port" in each.labels for each in page.samples(CLIENTS)):
            found, true = at_sides(page, CLIENTS), client_sides(ends)
            return [f"clients: {found} instead of {true}"] if minus(found, true) else []
        # The server of the scrape itself is the client at its other end.
        addresses = {client_of(remote) for _, remote in ends} | {"127.0.0.1"}
        return [
            f"clients: {int(each.value)} instead of {len(addresses)}"
            for each in page.samples(CLIENTS)
            if each.value != len(addresses)
        ]

    @property
    def _may_reset(self) -> bool:
        return self._direction == "all"


def units(page: oracle.Page) -> Counter[str]:
    """Return the established connections of each unit, if they are counted by unit."""
    found: Counter[str] = Counter()
    for each in page.samples(ESTABLISHED):
        found[each.labels.get("unit", "")] += int(each.value)
    del found[""]
    return found


def sides(ends: oracle.Ends) -> Counter[Side]:
    """Return how many connections of the listeners ss(8) shows, each at both ends."""
    found: Counter[Side] = Counter()
    for (local, remote), number in ends.items():
        for direction, end in (("inbound", local), ("outbound", remote)):
            address, _, port = end.rpartition(":")
            is_ipv6 = address.startswith("[") and not address.startswith("[::ffff:")
            if int(port) in LISTENED:
                found[direction, int(port), "6" if is_ipv6 else "4"] += number
    return found


def client_of(end: str) -> str:
    """Return the client of an end as ss(8) prints it: an IPv4 address, or an IPv6 /64."""
    address = end.rpartition(":")[0].strip("[]").removeprefix("::ffff:")
    if ":" in address:
        return str(ip_network((address, 64), strict=False))
    return address


def clients_by_port(ends: oracle.Ends) -> oracle.Counts:
    """Return how many clients each local port has, by IP version."""
    distinct = {(local, client_of(remote)) for local, remote in ends}
    by_port = {
        (port, version, client)
        for local, client in distinct
        for port, version in oracle.count(Counter({(local, ""): 1}))
    }
    return Counter((port, version) for port, version, _ in by_port)


def client_sides(ends: oracle.Ends) -> Counter[Side]:
    """Return how many clients the listeners have, and how many servers their clients."""
    distinct = {
        (side, client_of(remote))
        for local, remote in ends
        for side in sides(Counter({(local, remote): 1}))
    }
    return Counter(side for side, _ in distinct)


def at_sides(page: oracle.Page, name: str) -> Counter[Side]:
    """Return the values of a metric that has every label."""
    found: Counter[Side] = Counter()
    for each in page.samples(name):
        labels = each.labels
        is_inbound = labels["direction"] == "inbound"
        port = int(labels["port" if is_inbound else "remote_port"])
        if port in LISTENED:
            found[labels["direction"], port, labels["tcp_version"]] += int(each.value)
    return found


def connected(done: Sequence[str]) -> Counter[Side]:
    """Return how many connections the processes opened, each at both ends."""
    found: Counter[Side] = Counter()
    for each in filter(None, map(CONNECTED.match, done)):
        version = "6" if each["address"] == "::1" else "4"
        for direction in ("inbound", "outbound"):
            found[direction, int(each["port"]), version] += 1
    return found


def minus(some: Counter[Side], others: Counter[Side]) -> Counter[Side]:
    """Return the differences, also negative ones, without those that are 0."""
    return Counter(
        {
            each: some[each] - others[each]
            for each in {*some, *others}
            if some[each] != others[each]
        }
    )


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
        f" {walk.exact_at_once} of {walk.compared} comparisons without waiting,"
        f" {walk.audited} of opened and closed, {walk.compared_units} of units\n"
    )
    assert walk.operations > effort.of(10_007)
