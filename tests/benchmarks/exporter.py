# SPDX-License-Identifier: GPL-3.0-only
"""The exporter that is measured: the installed command, started and scraped."""

import contextlib
import http.client
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

from tests.support import Exporter

COMMAND = (str(Path(sys.executable).with_name("tcpexporter")),)
POLL_S = 0.005
DEADLINE_S = 60.0

AS_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
}


@contextlib.contextmanager
def running(source: str = "ebpf") -> Iterator[Exporter]:
    """An exporter that is ready, in this network namespace.

    Raises:
        RuntimeError: it has ended too early; what it said.
    """
    with Exporter("--source", source, command=COMMAND) as exporter:
        try:
            yield exporter
        except Exception as error:
            if exporter.process.poll() is None:
                raise
            code, complaints = exporter.stop()
            raise RuntimeError(f"the exporter ended with {code}:\n{complaints}") from error


@contextlib.contextmanager
def started() -> Iterator[tuple[Exporter, float]]:
    """The same, and how long it took from start to ready, in seconds."""
    start_s = time.perf_counter()
    with Exporter("--source", "ebpf", command=COMMAND, wait=False) as exporter:
        while not _is_ready(exporter):
            if (
                exporter.process.poll() is not None
                or time.perf_counter() > start_s + DEADLINE_S
            ):
                raise RuntimeError("the exporter does not become ready")
            time.sleep(POLL_S)
        yield exporter, time.perf_counter() - start_s


def _is_ready(exporter: Exporter) -> bool:
    with contextlib.closing(_connection(exporter)) as connection:
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except ConnectionError:
            return False


class Scraper:
    """Asks again and again on one connection, as Prometheus does."""

    def __init__(self, exporter: Exporter) -> None:
        self._connection = _connection(exporter)

    def get(self, headers: Mapping[str, str] = {}) -> bytes:
        """The page of metrics.

        Raises:
            RuntimeError: there is none, and why.
        """
        self._connection.request("GET", "/metrics", headers=dict(headers))
        with self._connection.getresponse() as response:
            page = response.read()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"/metrics: {response.status} {page.decode()}")
        return page

    def values(self) -> dict[tuple[str, str], float]:
        """By name and port, which is empty where there is none."""
        return {
            (sample.name, sample.labels.get("port", "")): sample.value
            for family in text_string_to_metric_families(self.get().decode())
            for sample in family.samples
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _connection(exporter: Exporter) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE_S)
