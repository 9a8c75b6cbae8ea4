# SPDX-License-Identifier: GPL-3.0-only
"""Shares a collection between concurrent scrapes, and writes it in their formats."""

import asyncio
import gzip
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tcpexporter.metrics.negotiation import choose
from tcpexporter.metrics.series_family import WrittenFamily, written

_END = b"# EOF\n"

KEPT_SAMPLES = 256
"""The text of a family with more samples is not kept for the next exposition: that would
require memory, and with many samples, one is likely to change."""


class Format(NamedTuple):
    """A text format of the exposition."""

    encode: Callable[[Collector], bytes]
    content_type: str
    end: bytes = b""
    """Text after the last metric family."""


TEXT = Format(*choose_encoder(""))
OPENMETRICS = Format(*choose_encoder("application/openmetrics-text"), _END)
"""The formats that the exporter can write, each in one version."""

_FORMATS = (TEXT, OPENMETRICS)


@lru_cache(maxsize=16)  # parsing takes 0.16 ms, and Prometheus repeats its header
def negotiate(accept: str) -> Format:
    """Return the format that an Accept header prefers; the text format by default."""
    return _FORMATS[choose(accept, [each.content_type for each in _FORMATS])]


Texts: TypeAlias = dict[str, tuple[WrittenFamily, bytes]]
"""By name, each family as it was last written in one format, and its text."""


class _FamilyCollector(Collector):
    """A collector that yields one given family: the encoders accept only collectors."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    @property
    def names(self) -> set[str]:
        """The names of the samples."""
        if isinstance(self._family, WrittenFamily):
            return {self._family.sample_name}
        return {each.name for each in self._family.samples}

    def collect(self) -> Iterator[Metric]:
        yield self._family

    def written(self, form: Format, before: Texts, kept: Texts) -> bytes:
        """Return the family in a text format, without the text after the last family.

        Args:
            form: the format.
            before: the texts of the last exposition. A family that has not changed is not
                written again.
            kept: gets the text, if it is to be kept for the next exposition.
        """
        family = self._family
        if not isinstance(family, WrittenFamily):
            return form.encode(self).removesuffix(form.end)
        known, text = before.get(family.name, (None, b""))
        if known is None or not family.is_written_as(known):
            head = _head(form, family.name, family.documentation, family.type)
            text = head + family.sample_lines()
        if len(family.numbers) <= KEPT_SAMPLES:
            kept[family.name] = family, text
        return text


@lru_cache(maxsize=256)
def _head(form: Format, name: str, documentation: str, kind: str) -> bytes:
    """Return the lines before the samples of a family, as the library writes them."""
    empty = _FamilyCollector(Metric(name, documentation, kind))
    return form.encode(empty).removesuffix(form.end)


class Exposition:
    """The exposition of one collection, written at most once in each format.

    Each family is written separately, so a request for selected names reuses the families
    that are already written.
    """

    def __init__(
        self, families: Iterable[Metric], texts: "dict[Format, Texts] | None" = None
    ) -> None:
        """Keep the families; each format is written when it is first requested.

        Args:
            families: of one collection.
            texts: those of the last exposition in each format; this one replaces them when
                it is written. None: there are none.
        """
        self._texts = {} if texts is None else texts
        self._collectors = [_FamilyCollector(written(family)) for family in families]
        self._written: dict[Format, Sequence[bytes]] = {}
        self._whole: dict[Format, bytes] = {}
        self._compressed: dict[Format, bytes] = {}

    @property
    def families(self) -> Iterator[Metric]:
        """The families, in their order."""
        return itertools.chain.from_iterable(each.collect() for each in self._collectors)

    def body(self, form: Format, names: Collection[str] = ()) -> bytes:
        """Return the exposition, or only the families that have samples of these names."""
        if names:
            return b"".join((*self._named(form, names), form.end))
        if form not in self._whole:
            self._whole[form] = b"".join((*self._families(form), form.end))
        return self._whole[form]

    def compressed(self, form: Format) -> bytes:
        """Return the whole exposition, compressed with gzip."""
        if form not in self._compressed:
            # This blocks the event loop: 2 ms for 10,000 series. Level 9 would take 60 ms.
            self._compressed[form] = gzip.compress(self.body(form), compresslevel=1)
        return self._compressed[form]

    def _named(self, form: Format, names: Collection[str]) -> Iterator[bytes]:
        for collector, text in zip(self._collectors, self._families(form), strict=True):
            if not collector.names.isdisjoint(names):
                yield text

    def _families(self, form: Format) -> Sequence[bytes]:
        if form not in self._written:
            before, kept = self._texts.get(form, {}), Texts()
            self._written[form] = [
                each.written(form, before, kept) for each in self._collectors
            ]
            self._texts[form] = kept
        return self._written[form]


class Collections:
    """Runs one collection for all requests that wait when the collection begins.

    A collection begins one iteration of the event loop after its first request, so
    requests of the same iteration share it. Later requests wait for the next collection.
    So no exposition is older than its request.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Collect from this registry, in the event loop."""
        self._registry = registry
        self._texts: dict[Format, Texts] = {}
        self._waiting: list[asyncio.Future[Exposition]] = []

    async def next(self) -> Exposition:
        """Return the exposition of a collection that begins after this call.

        Raises:
            SourceError: collecting failed. This, like any other exception of a collector,
                is raised in all requests that share the collection.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._collect)
        # Each request has its own future: cancelling a request does not cancel the others.
        exposition: asyncio.Future[Exposition] = loop.create_future()
        self._waiting.append(exposition)
        return await exposition

    def _collect(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            exposition = Exposition(self._registry.collect(), self._texts)
        except Exception as error:  # raised in the requests that wait
            for each in waiting:
                if not each.done():
                    each.set_exception(error)
        else:
            for each in waiting:
                if not each.done():
                    each.set_result(exposition)
