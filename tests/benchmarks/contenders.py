# SPDX-License-Identifier: GPL-3.0-only
"""Whatever counts connections, in a process of its own, asked for one count at a time."""

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
"""Until a process that has answered sleeps again: what it ran is in its account by then."""

NODE_EXPORTER_NAMES = ("prometheus-node-exporter", "node_exporter")
NODE_EXPORTER_SETTINGS = ("--collector.disable-defaults", "--collector.tcpstat")
NODE_STATES = "node_tcp_connection_states"


@dataclass(frozen=True)
class Count:
    """What somebody counted."""

    total: float | None = None
    """Established sockets."""
    ports: Sequence[float] | None = None
    """Those with the local ports `hold.PORTS`."""

    def off(self, sockets: int) -> float:
        """By how many it is wrong when that many are held."""
        if self.ports is not None:
            return sum(abs(each - sockets / 2 / len(PORTS)) for each in self.ports)
        return abs((self.total or 0) - sockets)


@dataclass(frozen=True)
class Sample:
    """Of counting once."""

    wall_s: float
    cpu_s: float
    """User and system, of all processes that take part; not of who asked."""
    count: Count


class Contender(Protocol):
    """What can be asked again and again."""

    name: str

    def sample(self) -> Sample:
        """Count once.

        Raises:
            NoNumberError: there is no count, or not in time.
        """
        ...

    def memory(self) -> kernel.Memory:
        """Of its process, now."""
        ...


class Scraped:
    """An exporter, asked by GET /metrics."""

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


def counted_by_us(page: bytes) -> Count:
    """From a page of tcpexporter, which counts inbound connections."""
    shown = values(page)
    return Count(ports=[shown.get((ESTABLISHED, str(port)), 0.0) for port in PORTS])


def counted_by_node_exporter(page: bytes) -> Count:
    """From a page of node_exporter, which has no ports."""
    wanted = f'{NODE_STATES}{{state="established"}} '
    lines = page.decode().splitlines()
    return Count(total=next(float(each.split()[1]) for each in lines if wanted in each))


class Worker:
    """One of `tests.benchmarks.worker`, which has its way ready."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self._process = process

    def sample(self) -> Sample:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        said = self.said()
        return Sample(
            said["wall_s"], said["cpu_s"], Count(total=said["total"], ports=said["ports"])
        )

    def said(self) -> dict[str, Any]:
        """The next that it says.

        Raises:
            NoNumberError: it says nothing; it is ended then.
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
        said: dict[str, Any] = json.loads(line)
        return said

    def memory(self) -> kernel.Memory:
        return kernel.memory(self._process.pid)


@contextlib.contextmanager
def worker(name: str, sockets: int) -> Iterator[Worker]:
    """One that has its way ready.

    Raises:
        NoNumberError: it does not come so far.
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
            started.said()
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what its shell has started


def node_exporter_command() -> str | None:
    """Where node_exporter is; None where it is not."""
    found = (shutil.which(name) for name in NODE_EXPORTER_NAMES)
    return next((each for each in found if each), None)


@contextlib.contextmanager
def node_exporter() -> Iterator[Scraped]:
    """One with nothing but its collector of TCP states.

    Raises:
        NoNumberError: it does not listen.
    """
    port = free_port()
    command = node_exporter_command()
    assert command is not None, "whoever measures has looked whether all are there"
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
