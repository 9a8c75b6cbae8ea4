# SPDX-License-Identifier: GPL-3.0-only
"""Collections that all who ask at the same time share, and the pages made of them."""

import asyncio
import copy
import gzip
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector


class Form(NamedTuple):
    """In what form somebody asks for a page."""

    accept: str
    """The value of the Accept header."""
    names: frozenset[str] = frozenset()
    """Of the samples that are wanted; none: all of them."""
    packed: bool = False
    """By gzip."""


class Encoded(NamedTuple):
    """A page in one form."""

    body: bytes
    content_type: str


class Page(Collector):
    """What one collection gave. Each form of it is made once, however many ask for it."""

    def __init__(self, families: Sequence[Metric]) -> None:
        """Keep the families, and none of their forms yet."""
        self._families = families
        self._forms: dict[Form, Encoded] = {}

    def collect(self) -> Iterator[Metric]:
        """The families, as `prometheus_client` asks for them."""
        yield from self._families

    def encoded(self, form: Form) -> Encoded:
        """The page in this form."""
        if form not in self._forms:
            self._forms[form] = self._pack(form) if form.packed else self._encode(form)
        return self._forms[form]

    def _encode(self, form: Form) -> Encoded:
        try:
            encode, content_type = choose_encoder(form.accept)
        except TypeError:
            # It compares the parts of any version as if they were numbers.
            encode, content_type = choose_encoder("")
        page = Page(list(self._named(form.names))) if form.names else self
        return Encoded(encode(page), content_type)

    def _pack(self, form: Form) -> Encoded:
        body, content_type = self.encoded(form._replace(packed=False))
        # Everybody else waits meanwhile: 10,000 series take 2 ms, and 60 ms at level 9.
        return Encoded(gzip.compress(body, compresslevel=1), content_type)

    def _named(self, names: Collection[str]) -> Iterator[Metric]:
        for family in self._families:
            if samples := [each for each in family.samples if each.name in names]:
                part = copy.copy(family)
                part.samples = samples
                yield part


class Collections:
    """Collects for all who wait when a collection begins, and for nobody who comes later.

    A collection begins one turn of the event loop after the first one has asked, so whoever
    asks in that turn shares it. Those who come while it goes on are for the next one: no
    page is older than the question.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Collect from a registry, in the event loop."""
        self._registry = registry
        self._waiting: list[asyncio.Future[Page]] = []

    async def next(self) -> Page:
        """What a collection gives that has not begun yet.

        Raises:
            SourceError: it cannot be had. This, like what nobody expects, is raised for all
                who wait for it.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._collect)
        # One for each: who is cancelled does not take others along.
        asked: asyncio.Future[Page] = loop.create_future()
        self._waiting.append(asked)
        return await asked

    def _collect(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            page = Page(list(self._registry.collect()))
        except Exception as error:  # theirs, who wait
            for each in waiting:
                if not each.done():
                    each.set_exception(error)
        else:
            for each in waiting:
                if not each.done():
                    each.set_result(page)
