# SPDX-License-Identifier: GPL-3.0-only
"""Times the BPF program, also in turn with the program that had no series numbers."""

import contextlib
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from tcpexporter.config.settings import Settings
from tcpexporter.connections.parts import TIME_SHIFT, client_masks, has_owner
from tcpexporter.ebpf import loading
from tcpexporter.ebpf.loader_protocol import Request
from tcpexporter.ebpf.program import attach
from tcpexporter.ebpf.runs import Runs
from tcpexporter.host import namespaces
from tests.benchmarks import earlier_program
from tests.benchmarks.churn import Ending, by_fin, by_rst, churn
from tests.benchmarks.figures import STATE_CHANGES_BY_FIN, STATE_CHANGES_BY_RST
from tests.benchmarks.kernel import NO_RUNS, Program, ProgramRuns
from tests.benchmarks.sizes import DEFAULT_MAX_CONNECTIONS

BATCH_CONNECTIONS = 97
"""Number of connections of a batch. It is prime, so that it is no multiple of a table's
size."""

ATTEMPTS = 20
"""Attempts to measure a batch of 5 ms without state changes elsewhere on the host."""

TURNS = 10
"""How many times a round attaches each of the compared programs. It is even, because the
order is reversed each time."""

TURN_BATCHES = 5
"""Batches of each ending while one of the compared programs is attached."""

STATE_CHANGES: Mapping[Ending, int] = {
    by_fin: STATE_CHANGES_BY_FIN,
    by_rst: STATE_CHANGES_BY_RST,
}

EARLIER = "earlier"
COMPARED = {
    "event_times": Settings(clients=False),
    "event_clients_times": Settings(),
    "event_owners_times": Settings(labels=("port", "tcp_version", "unit")),
    "event_histograms_times": Settings(histograms=True),
}
"""The settings of each program that is compared with the earlier one, by figure."""


def batch_runs(
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


class Attachable:
    """A loaded BPF program, which is attached at certain times only."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.program = Program(Path(f"/proc/self/fdinfo/{descriptor}"))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        link = attach(self._descriptor)
        try:
            yield
        finally:
            os.close(link)


@contextlib.contextmanager
def compared_programs() -> Iterator[dict[str, Attachable]]:
    """Load the earlier program and those of `COMPARED`, for this network namespace."""
    netns = namespaces.inode()
    with contextlib.ExitStack() as stack:
        programs = {EARLIER: earlier_program.load(DEFAULT_MAX_CONNECTIONS, netns)}
        stack.callback(os.close, programs[EARLIER])
        for figure, settings in COMPARED.items():
            programs[figure] = _present_program(netns, settings)
            stack.callback(os.close, programs[figure])
        yield {name: Attachable(each) for name, each in programs.items()}


def _present_program(netns: int, settings: Settings) -> int:
    bounds = tuple(round(each * 1e9) >> TIME_SHIFT for each in settings.bounds_s)
    request = Request(
        DEFAULT_MAX_CONNECTIONS,
        netns,
        secret=(1, 2),
        lifetime_bounds=bounds,
        client_masks=client_masks(*settings.client_prefix) if settings.clients else None,
        by_cgroup=has_owner(settings.series_labels),
    )
    descriptors = loading.load(request)
    Runs(descriptors)  # turns on the caches of the program
    # The program has references to its maps.
    program = os.dup(descriptors.program)
    descriptors.close()
    return program


@contextlib.contextmanager
def all_attached(programs: Collection[Attachable]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for each in programs:
            stack.enter_context(each.attached())
        yield


def ratios(
    programs: Mapping[str, Attachable], listeners: Sequence[socket.socket]
) -> dict[str, float]:
    """Measure one round: the mean time of each program, relative to the earlier program.

    Half of the connections are closed by FIN and half by RST. One program is attached at a
    time: the first of several would pay for the cache misses of the socket.
    """
    total = dict.fromkeys(programs, NO_RUNS)
    for turn in range(TURNS):
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            program = programs[name].program
            with programs[name].attached():
                churn(listeners, BATCH_CONNECTIONS, by_fin)  # warms up
                for ending in (by_fin, by_rst) * TURN_BATCHES:
                    total[name] += batch_runs(program, listeners, ending)
    earlier_ns = total.pop(EARLIER).mean_ns
    return {name: runs.mean_ns / earlier_ns for name, runs in total.items()}
