# SPDX-License-Identifier: GPL-3.0-only
"""Collections that requests share, and expositions in each format."""

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tcpexporter.errors import SourceError
from tcpexporter.metrics.exposition import (
    OPENMETRICS,
    TEXT,
    Collections,
    Exposition,
    Format,
)


class Numbered(Collector):
    """A collector whose exposition has the number of the collection."""

    collections = 0
    error: Exception | None = None

    def collect(self) -> Iterator[Metric]:
        self.collections += 1
        if self.error:
            raise self.error
        yield GaugeMetricFamily("number", "Number of this collection.", self.collections)
        yield CounterMetricFamily("seen", "Of something.", 7)


def make() -> tuple[Numbered, Collections]:
    collector = Numbered()
    registry = CollectorRegistry()
    registry.register(collector)
    return collector, Collections(registry)


def number(page: Exposition) -> float:
    (line,) = (each for each in page.body(TEXT).splitlines() if each.startswith(b"number "))
    return float(line.split()[1])


def test_concurrent_requests_share_one_collection() -> None:
    """101 concurrent requests cause one collection; consecutive ones cause one each."""
    collector, collections = make()

    async def run() -> None:
        pages = await asyncio.gather(*(collections.next() for _ in range(101)))
        assert {number(page) for page in pages} == {1}
        for each in (2, 3, 4):
            assert number(await collections.next()) == each

    asyncio.run(run())
    assert collector.collections == 4


def test_no_exposition_is_older_than_its_request() -> None:
    """This holds for a request in any turn of the event loop."""
    collector, collections = make()

    async def ask(turns: int) -> tuple[int, float]:
        for _ in range(turns):
            await asyncio.sleep(0)
        begun = collector.collections
        return begun, number(await collections.next())

    async def run() -> list[tuple[int, float]]:
        return await asyncio.gather(*(ask(turns) for turns in range(23)))

    asked = asyncio.run(run())
    assert all(got == begun + 1 for begun, got in asked)
    assert collector.collections > 2


@pytest.mark.parametrize("error", [SourceError("gone"), ZeroDivisionError("a fault")])
def test_an_error_reaches_all_waiting_requests(error: Exception) -> None:
    """Each of them raises the error; the next request collects again."""
    collector, collections = make()

    async def run() -> None:
        collector.error = error
        outcomes = await asyncio.gather(
            *(collections.next() for _ in range(5)), return_exceptions=True
        )
        assert outcomes == [error] * 5
        collector.error = None
        assert number(await collections.next()) == 2

    asyncio.run(run())


def test_a_cancelled_scrape_does_not_cancel_the_collection_it_shares() -> None:
    """Two requests share a collection; one is cancelled, the other gets the page."""
    collector, collections = make()

    async def run() -> None:
        first = asyncio.ensure_future(collections.next())
        second = asyncio.ensure_future(collections.next())
        await asyncio.sleep(0)
        first.cancel()
        assert number(await second) == 1
        assert first.cancelled()
        collector.error = SourceError("gone")
        third = asyncio.ensure_future(collections.next())
        await asyncio.sleep(0)
        third.cancel()
        with pytest.raises(SourceError):
            await collections.next()

    asyncio.run(run())


class Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


@pytest.mark.parametrize("form", [TEXT, OPENMETRICS])
def test_an_exposition_is_encoded_once(form: Format) -> None:
    """All requests share the encoded text, which equals that of the whole exposition."""
    families = [GaugeMetricFamily("number", "One.", 5), CounterMetricFamily("seen", "", 7)]
    written: list[str] = []

    def encode(part: Collector) -> bytes:
        written.extend(family.name for family in part.collect())
        return form.encode(part)

    page, recording = Exposition(families), form._replace(encode=encode)
    for _ in range(100):
        whole, compressed = page.body(recording), page.compressed(recording)
        page.body(recording, ["number"])
    assert written == ["number", "seen"]
    assert gzip.decompress(compressed) == whole
    registry = CollectorRegistry()
    registry.register(Families(families))
    assert whole == form.encode(registry)


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["number"], ["number 5.0"]),
        (["seen_total"], ["seen_total 7.0"]),
        (["number", "seen_total", "absent"], ["number 5.0", "seen_total 7.0"]),
        (["absent"], []),
        ([], ["number 5.0", "seen_total 7.0"]),
    ],
)
def test_names_select_families(names: list[str], lines: list[str]) -> None:
    """Names of samples are accepted; OpenMetrics always has its end marker."""
    page = Exposition(
        [GaugeMetricFamily("number", "One.", 5), CounterMetricFamily("seen", "Some.", 7)]
    )
    for form in (TEXT, OPENMETRICS):
        shown = page.body(form, names).decode().splitlines(keepends=True)
        assert [line[:-1] for line in shown if not line.startswith("#")] == lines
        assert ("# EOF\n" in shown[-1:]) == (form is OPENMETRICS)
