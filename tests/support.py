# SPDX-License-Identifier: GPL-3.0-only
"""Helpers for several kinds of tests: a running exporter, and sockets in a namespace."""

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families
from pyroute2 import netns as network_namespaces

from tcpexporter.ebpf.libbpf import load_libbpf

LONG_TERM = "netstat_tcp_longterm_connections_total"
ESTABLISHED = "tcp_established_connections"
DEADLINE_S = 101.0
"""Time limit of steps that usually require a second or two. An emulated guest is 15
times slower."""

BPF_PROG_NAME = slice(64, 80)
"""Offset of the name in ``struct bpf_prog_info``, include/uapi/linux/bpf.h."""

PROG_ID = re.compile(r"^prog_id:\s*(\d+)$", re.MULTILINE)

_numbers = itertools.count()


@functools.cache
def why_no_bpf() -> str | None:
    """Return why kernel tests cannot run here, or None if they can."""
    if os.geteuid() != 0:
        return "kernel tests require root"
    if importlib.util.find_spec("bcc") is None:
        return "kernel tests require the distribution's BCC"
    return None


@contextlib.contextmanager
def new_netns() -> Iterator[str]:
    """Create a network namespace with a loopback device only; yield its name."""
    name = f"tcpexporter-test-{os.getpid()}-{next(_numbers)}"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


@contextlib.contextmanager
def inside(netns: str) -> Iterator[None]:
    """Move this thread, and the processes that it starts, to a network namespace."""
    network_namespaces.pushns(netns)
    try:
        yield
    finally:
        network_namespaces.popns()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def eventually(check: Callable[[], bool]) -> None:
    """Wait until ``check`` returns True; fail at the deadline."""
    until = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < until, "the condition was not true before the deadline"
        time.sleep(0.05)


@contextlib.contextmanager
def repeating(work: Callable[[], None], *, pause_s: float) -> Iterator[None]:
    """Call ``work`` repeatedly in a thread until the end of the block."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(pause_s):
            work()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Peers:
    """A listener, and both ends of each connection to it."""

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, backlog: int = 512
    ) -> None:
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.socket(self._family)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((address, port))
        self.listener.listen(backlog)
        self.port: int = self.listener.getsockname()[1]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def connect(self, count: int, address: str | None = None) -> None:
        """Open this many more connections, and accept them."""
        target = address or self.listener.getsockname()[0]
        for _ in range(count):
            client = socket.create_connection((target, self.port))
            server, _ = self.listener.accept()
            self.pairs.append((client, server))

    def close(self) -> None:
        for each in itertools.chain([self.listener], *self.pairs):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reset(connected: socket.socket) -> None:
    """Close with RST instead of FIN: socket(7), SO_LINGER."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connected.close()


def ss_established(port: int) -> Counter[str]:
    """Return how many connections ss(8) shows at a local port, by IP version."""
    shown = subprocess.check_output(
        ["ss", "-Htn", "state", "established", f"( sport = :{port} )"], text=True
    )
    locals_ = (line.split()[2] for line in shown.splitlines())
    return Counter(
        "6" if "[" in each and "::ffff:" not in each else "4" for each in locals_
    )


def free_port() -> int:
    """Return a port without a listener, below the kernel's range of ephemeral ports.

    The kernel can give an ephemeral port to a listener at [::1] while an exporter listens
    to it at 127.0.0.1. The exporter would not count the listener's connections.
    """
    while True:
        port = random.randrange(20011, 32768)  # noqa: S311
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Exporter:
    """An exporter process, in the network namespace of the test."""

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "tcpexporter"),
        address: str = "127.0.0.1",
        port: int = 0,
        wait: bool = True,
    ) -> None:
        self.port = port or free_port()
        self._address = address
        self.process = subprocess.Popen(
            [*command, "--listen", f"{address}:{self.port}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if wait:
            with contextlib.ExitStack() as undo:
                undo.push(self)
                self.wait_until_ready()
                undo.pop_all()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until and self.process.poll() is None:
            if self.is_ready():
                return
            time.sleep(0.02)
        self.process.kill()
        _, complaints = self.process.communicate()
        raise AssertionError(f"the exporter does not become ready:\n{complaints}")

    def is_ready(self) -> bool:
        """Return whether the exporter serves, and has read pre-existing connections."""
        with contextlib.suppress(OSError):
            self.get("/-/ready")
            return True
        return False

    def get(self, path: str) -> str:
        url = f"http://{self._address}:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
            page: str = response.read().decode()
            return page

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Scrape once; return values by name and sorted labels."""
        return _samples(self.get("/metrics"))

    def value(self, name: str, /, **labels: str | int) -> float | None:
        """Scrape once; return one value, or None if there is no such series."""
        wanted = tuple(sorted((key, str(value)) for key, value in labels.items()))
        # Parsing only lines that can match is faster on a page with thousands of series.
        shown = [f'{key}="{value}"' for key, value in wanted]
        lines = [
            line
            for line in self.get("/metrics").splitlines()
            if line.startswith(name) and all(each in line for each in shown)
        ]
        return _samples("".join(f"{line}\n" for line in lines)).get((name, wanted))

    def established(self, port: int, version: int = 4, **netns: str) -> float | None:
        return self.value(ESTABLISHED, port=port, tcp_version=version, **netns)

    def long_term(self, port: int, version: int = 4, **netns: str) -> float | None:
        return self.value(LONG_TERM, port=port, tcp_version=version, **netns)

    def stop(self) -> tuple[int, str]:
        """End the exporter with SIGTERM; return its exit code and its standard error."""
        self.process.terminate()
        _, complaints = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, complaints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            # This also ends child processes: unshare(1) starts the exporter as its child.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def _samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def bpf_programs() -> list[str]:
    """Return the names of all BPF programs in the kernel."""
    return list(bpf_programs_by_id().values())


def bpf_programs_of(process: int) -> set[int]:
    """Return the ids of the programs that a process holds (bpf_prog_show_fdinfo)."""
    held = set()
    with contextlib.suppress(FileNotFoundError):  # the process has ended
        for each in Path(f"/proc/{process}/fdinfo").iterdir():
            # the descriptor was closed in the meantime
            with contextlib.suppress(FileNotFoundError):
                if found := PROG_ID.search(each.read_text()):
                    held.add(int(found[1]))
    return held


def bpf_programs_by_id() -> dict[int, str]:
    libbpf = load_libbpf()
    number = ctypes.c_uint32(0)
    names = {}
    while libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        descriptor = libbpf.bpf_prog_get_fd_by_id(number)
        if descriptor < 0:  # the program was freed in the meantime
            continue
        info = ctypes.create_string_buffer(512)
        size = ctypes.c_uint32(len(info))
        libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size))
        os.close(descriptor)
        name, _, _ = info.raw[BPF_PROG_NAME].partition(b"\0")
        names[number.value] = name.decode()
    return names
