# SPDX-License-Identifier: GPL-3.0-only
"""Collections and who shares them: counted, in turns of the event loop."""

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tcpexporter import exposition
from tcpexporter.errors import SourceError
from tcpexporter.exposition import Collections, Form, Page

OPENMETRICS = "application/openmetrics-text;version=1.0.0"


class Numbered(Collector):
    """A collector whose page says the how manieth it is."""

    collections = 0
    trouble: Exception | None = None

    def collect(self) -> Iterator[Metric]:
        self.collections += 1
        if self.trouble:
            raise self.trouble
        yield GaugeMetricFamily("number", "Of this collection.", self.collections)
        yield CounterMetricFamily("seen", "Of something.", 7)


def make() -> tuple[Numbered, Collections]:
    collector = Numbered()
    registry = CollectorRegistry()
    registry.register(collector)
    return collector, Collections(registry)


def number(page: Page) -> float:
    family = next(page.collect())
    return float(family.samples[0].value)


def test_all_who_wait_share_one_collection() -> None:
    """A hundred at once are one collection, one after another are one each."""
    collector, collections = make()

    async def run() -> None:
        pages = await asyncio.gather(*(collections.next() for _ in range(101)))
        assert {number(page) for page in pages} == {1}
        for each in (2, 3, 4):
            assert number(await collections.next()) == each

    asyncio.run(run())
    assert collector.collections == 4


def test_nobody_gets_a_page_from_before() -> None:
    """Whoever asks in whatever turn of the loop, the collection begins after that."""
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


@pytest.mark.parametrize("trouble", [SourceError("gone"), ZeroDivisionError("a fault")])
def test_trouble_reaches_all_who_wait(trouble: Exception) -> None:
    """Each gets the error; the next collection is tried again."""
    collector, collections = make()

    async def run() -> None:
        collector.trouble = trouble
        outcomes = await asyncio.gather(
            *(collections.next() for _ in range(5)), return_exceptions=True
        )
        assert outcomes == [trouble] * 5
        collector.trouble = None
        assert number(await collections.next()) == 2

    asyncio.run(run())


def test_who_gives_up_does_not_take_others_along() -> None:
    """Of two that wait for one collection, one is cancelled; the other gets the page."""
    collector, collections = make()

    async def run() -> None:
        first = asyncio.ensure_future(collections.next())
        second = asyncio.ensure_future(collections.next())
        await asyncio.sleep(0)
        first.cancel()
        assert number(await second) == 1
        assert first.cancelled()
        collector.trouble = SourceError("gone")
        third = asyncio.ensure_future(collections.next())
        await asyncio.sleep(0)
        third.cancel()
        with pytest.raises(SourceError):
            await collections.next()

    asyncio.run(run())


def test_each_form_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred that ask for the same get the same bytes; packed ones are from these."""
    made = []

    def noting(accept: str) -> object:
        made.append(accept)
        return choose_encoder(accept)

    monkeypatch.setattr(exposition, "choose_encoder", noting)
    page = Page([GaugeMetricFamily("number", "One.", 1)])
    for _ in range(100):
        plain = page.encoded(Form(OPENMETRICS))
        packed = page.encoded(Form(OPENMETRICS, packed=True))
        page.encoded(Form(""))
    assert gzip.decompress(packed.body) == plain.body
    assert packed.content_type == plain.content_type
    assert made == [OPENMETRICS, ""]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ({"number"}, ["number 5.0"]),
        ({"seen_total"}, ["seen_total 7.0"]),
        ({"number", "seen_total", "absent"}, ["number 5.0", "seen_total 7.0"]),
        ({"absent"}, []),
        ((), ["number 5.0", "seen_total 7.0"]),
    ],
)
def test_names(names: set[str], lines: list[str]) -> None:
    """Samples are chosen by name, and the page stays whole for others."""
    page = Page(
        [GaugeMetricFamily("number", "One.", 5), CounterMetricFamily("seen", "Some.", 7)]
    )
    shown = page.encoded(Form("", frozenset(names))).body.decode().splitlines()
    assert [line for line in shown if not line.startswith("#")] == lines
    assert b"seen_total 7.0" in page.encoded(Form("")).body
