# SPDX-License-Identifier: GPL-3.0-only
"""The compared methods: each counts connections in its own process, once per request."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.benchmarks import ROOT, kernel
from tests.benchmarks.exporter import DEADLINE_S, NoNumberError, Scraper, values
from tests.benchmarks.hold import PORTS
from tests.support import ESTABLISHED, free_port

ASLEEP_S = 0.002
"""Pause after an answer, in which the process goes to sleep and the kernel updates its
CPU time."""

NODE_EXPORTER_NAMES = ("prometheus-node-exporter", "node_exporter")
NODE_EXPORTER_SETTINGS = ("--collector.disable-defaults", "--collector.tcpstat")
NODE_STATES = "node_tcp_connection_states"


@dataclass(frozen=True)
class Count:
    """The result of one count."""

    total: float | None = None
    """Established sockets."""
    ports: Sequence[float] | None = None
    """Connections at each of the local ports `hold.PORTS`."""

    def error(self, sockets: int) -> float:
        """Return the error of the count when ``sockets`` sockets are held."""
        if self.ports is not None:
            return sum(abs(each - sockets / 2 / len(PORTS)) for each in self.ports)
        return abs((self.total or 0) - sockets)


@dataclass(frozen=True)
class Sample:
    """The measurements of one count."""

    wall_s: float
    cpu_s: float
    """CPU time, user and system, of all processes that count. The process that requests
    the count is not included."""
    count: Count


class Contender(Protocol):
    """A method that can count repeatedly."""

    name: str

    def sample(self) -> Sample:
        """Count once.

        Raises:
            NoNumberError: the method gives no count within the time limit.
        """
        ...

    def memory(self) -> kernel.Memory:
        """Return the present memory of the process that counts."""
        ...


class Scraped:
    """An exporter that counts when it answers GET /metrics."""

    def __init__(
        self, name: str, pid: int, scraper: Scraper, count: Callable[[bytes], Count]
    ) -> None:
        self.name = name
        self._pid = pid
        self._scraper = scraper
        self._count = count

    def sample(self) -> Sample:
        cpu_before_ns, start_s = kernel.cpu_ns(self._pid), time.perf_counter()
        page = self._scraper.get()
        wall_s = time.perf_counter() - start_s
        time.sleep(ASLEEP_S)
        cpu_s = (kernel.cpu_ns(self._pid) - cpu_before_ns) / 1e9
        return Sample(wall_s, cpu_s, self._count(page))

    def memory(self) -> kernel.Memory:
        return kernel.memory(self._pid)


def counted_by_tcpexporter(page: bytes) -> Count:
    """Return the count from an exposition of tcpexporter, which has inbound connections."""
    shown = values(page)
    return Count(ports=[shown.get((ESTABLISHED, str(port)), 0.0) for port in PORTS])


def counted_by_node_exporter(page: bytes) -> Count:
    """Return the count from an exposition of node_exporter, which has no ports."""
    wanted = f'{NODE_STATES}{{state="established"}} '
    lines = page.decode().splitlines()
    return Count(total=next(float(each.split()[1]) for each in lines if wanted in each))


class Worker:
    """A process of `tests.benchmarks.worker` that is ready to count."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self._process = process

    def sample(self) -> Sample:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        answer = self.receive()
        return Sample(
            answer["wall_s"],
            answer["cpu_s"],
            Count(total=answer["total"], ports=answer["ports"]),
        )

    def receive(self) -> dict[str, Any]:
        """Return the next message of the process.

        Raises:
            NoNumberError: the process has ended, or sent no message within the time limit
                and was killed.
        """
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], DEADLINE_S)
        if not ready:
            self._process.kill()
            raise NoNumberError(f"it gave no number within {DEADLINE_S:.0f} s")
        line = stdout.readline()
        if not line:
            raise NoNumberError(f"it ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def memory(self) -> kernel.Memory:
        return kernel.memory(self._process.pid)


@contextlib.contextmanager
def worker(name: str, sockets: int) -> Iterator[Worker]:
    """Run a process that is ready to count.

    Raises:
        NoNumberError: the process does not become ready.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.worker", name, str(sockets)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            started = Worker(name, process)
            started.receive()
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                # this also ends child processes of the shell
                os.killpg(process.pid, signal.SIGKILL)


def node_exporter_command() -> str | None:
    """Return the path of node_exporter, or None if it is not installed."""
    found = (shutil.which(name) for name in NODE_EXPORTER_NAMES)
    return next((each for each in found if each), None)


@contextlib.contextmanager
def node_exporter() -> Iterator[Scraped]:
    """Run node_exporter with no other collector than that of TCP states.

    Raises:
        NoNumberError: node_exporter does not listen within the time limit.
    """
    port = free_port()
    command = node_exporter_command()
    assert command is not None, "machine.absent() must be empty"
    listen = f"--web.listen-address=127.0.0.1:{port}"
    with subprocess.Popen(
        [command, *NODE_EXPORTER_SETTINGS, listen], stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_until_it_listens(port)
            with Scraper(port) as scraper:
                yield Scraped(
                    "node_exporter", process.pid, scraper, counted_by_node_exporter
                )
        finally:
            process.kill()


def _wait_until_it_listens(port: int) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionError as error:
            if time.monotonic() > until_s:
                raise NoNumberError("it does not listen") from error
            time.sleep(0.05)
        else:
            return
