# SPDX-License-Identifier: GPL-3.0-only
"""Measures what many exporters cost a Prometheus, for docs/fleet.md: make fleet.

A real exporter with connections on `PORTS` ports gives the expositions. A server of this
process answers for `TARGETS` addresses of the loopback network with the exposition of the
default settings, whose values change, and a real Prometheus scrapes them.
"""

import asyncio
import contextlib
import gzip
import random
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import tables
from tests.benchmarks import ROOT
from tests.benchmarks.number_format import format_digits
from tests.e2e.support import Prometheus
from tests.support import Exporter, Peers, free_port, inside, new_netns

DOCUMENT = ROOT / "docs/fleet.md"
BEGIN = "<!-- figures: written by make fleet -->"
END = "<!-- end of figures -->"

PORTS = 10
CONNECTIONS = 3
TARGETS = 200
HOSTS = 10_000
INTERVAL_S = 5
DURATION_S = 180
VARIANTS = 31
"""Expositions with different values, which the targets return in turn."""

SETTINGS = {
    "the default": (),
    "`--clients=false`": ("--clients=false",),
    "`--labels port`": ("--labels", "port"),
    "`--labels port,tcp_version,unit`": ("--labels", "port,tcp_version,unit"),
    "`--histograms`": ("--histograms",),
    "`--simple`": ("--simple",),
}


class Size(NamedTuple):
    """The size of an exposition."""

    samples: int
    plain_bytes: int
    gzip_bytes: int


class Cost(NamedTuple):
    """What the targets cost Prometheus."""

    series: float
    bytes_per_series: float
    cpu_share: float


def main() -> None:
    with new_netns() as netns, inside(netns), contextlib.ExitStack() as opened:
        for _ in range(PORTS):
            opened.enter_context(Peers()).connect(CONNECTIONS)
        pages = {}
        for name, flags in SETTINGS.items():
            with Exporter(*flags) as exporter:
                exporter.get("/metrics")
                pages[name] = exporter.get("/metrics")
        cost = _cost(pages["the default"])
    sizes = {name: _size(page) for name, page in pages.items()}
    tables.replace(DOCUMENT, BEGIN, END, _text(sizes, cost))


def _samples_of(page: str) -> list[str]:
    return [line for line in page.splitlines() if line and not line.startswith("#")]


def _size(page: str) -> Size:
    body = page.encode()
    return Size(len(_samples_of(page)), len(body), len(gzip.compress(body, 1)))


def _varied(page: str, seed: int) -> bytes:
    """Return the exposition with each number increased by a random one, compressed."""
    chance = random.Random(seed)  # noqa: S311

    def larger(found: re.Match[str]) -> str:
        return f" {int(found[1]) + 20 * seed + chance.randrange(20)}"

    return gzip.compress(re.sub(r"(?m) (\d+)(?:\.0)?$", larger, page).encode(), 1)


@contextlib.contextmanager
def _served(page: str) -> Iterator[int]:
    """Serve the exposition on all addresses; yield the port."""
    bodies = [_varied(page, seed) for seed in range(VARIANTS)]
    port = free_port()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                body = bodies[int(time.monotonic() / INTERVAL_S) % VARIANTS]
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\n"
                    b"content-encoding: gzip\r\n"
                    b"content-length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
                await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    # Start the server in this thread, which is in the network namespace.
    server = loop.run_until_complete(asyncio.start_server(respond, "0.0.0.0", port))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _cost(page: str) -> Cost:
    with (
        _served(page) as port,
        tempfile.TemporaryDirectory() as without,
        tempfile.TemporaryDirectory() as directory,
    ):
        with Prometheus(Path(without), interval_s=INTERVAL_S) as prometheus:
            time.sleep(DURATION_S / 3)
            unused = _own_metrics(prometheus)
        targets = [f"127.0.{1 + at // 250}.{1 + at % 250}:{port}" for at in range(TARGETS)]
        with Prometheus(Path(directory), *targets, interval_s=INTERVAL_S) as prometheus:
            began = _own_metrics(prometheus)
            time.sleep(DURATION_S)
            used = _own_metrics(prometheus)
            assert prometheus.query("sum(up)") == {(): TARGETS}
    series = used["prometheus_tsdb_head_series"]
    memory = "process_resident_memory_bytes"
    cpu_s = used["process_cpu_seconds_total"] - began["process_cpu_seconds_total"]
    return Cost(series, (used[memory] - unused[memory]) / series, cpu_s / DURATION_S)


def _own_metrics(prometheus: Prometheus) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{prometheus.address}/metrics") as response:
        page = response.read().decode()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in _samples_of(page))
        if "{" not in name
    }


def _text(sizes: dict[str, Size], cost: Cost) -> str:
    rows = [
        [
            name,
            str(size.samples),
            f"{size.plain_bytes / 1024:.1f} KiB",
            f"{size.gzip_bytes / 1024:.1f} KiB",
            f"{size.samples * HOSTS / 15:,.0f}",
            f"{size.samples * HOSTS * cost.bytes_per_series / 2**30:.0f} GiB",
        ]
        for name, size in sizes.items()
    ]
    headings = [
        *("settings", "samples of a scrape", "exposition", "after gzip"),
        f"samples per second, {HOSTS:,} hosts",
        f"memory, {HOSTS:,} hosts",
    ]
    return (
        f"{tables.markdown([headings, *rows])}\n\n"
        f"The exporter has {PORTS} ports. The last two columns are extrapolated, for a "
        f"scrape interval of 15 s. Measured: a Prometheus that scrapes {TARGETS} targets "
        f"every {INTERVAL_S} s for {DURATION_S} s has {cost.series:,.0f} series. It needs "
        f"{format_digits(cost.bytes_per_series / 1024)} KiB of resident memory for each, "
        f"without what it needs for itself, and {cost.cpu_share:.2f} of a core, which is "
        f"{format_digits(cost.cpu_share / (cost.series / INTERVAL_S) * 1e6)} µs for each "
        "sample."
    )


if __name__ == "__main__":
    main()
