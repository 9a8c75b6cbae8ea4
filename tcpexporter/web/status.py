# SPDX-License-Identifier: GPL-3.0-only
"""Serves the status page and its data, and keeps samples of the last 15 minutes."""

import asyncio
import gzip
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from importlib import resources

from tcpexporter.errors import SourceError, reason
from tcpexporter.metrics.exposition import Exposition
from tcpexporter.metrics.history import INTERVAL_S, History
from tcpexporter.metrics.negotiation import prefers_gzip
from tcpexporter.metrics.status import Status, read, sample, summarize
from tcpexporter.web.http1 import Request, Response, text
from tcpexporter.web.status_page import CONTENT_SECURITY_POLICY, to_html, to_json

log = logging.getLogger(__name__)

IDLE_SHARE = 0.001
"""Maximum share of a core that samples use: a slow sample delays the next one."""

UNWATCHED_S = 15
"""Minimum time between two samples while no browser shows the page.

A point of the history covers the same time."""

WATCHED_FOR_S = 60
"""How long after a request a browser counts as showing the page."""

RELOAD_S = 30
"""Time after which a browser without JavaScript loads the page again."""


_VARY = {"vary": "Accept-Encoding"}


class _Body:
    """A response body, compressed when that is first requested."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    @cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.body, compresslevel=1)

    @cached_property
    def etag(self) -> str:
        """A weak validator: it is that of the plain and of the compressed body."""
        return f'W/"{hashlib.sha256(self.body).hexdigest()[:32]}"'


def _file(name: str) -> _Body:
    return _Body((resources.files(__package__) / "static" / name).read_bytes())


FILES = {
    "/static/status.css": ("text/css; charset=utf-8", _file("status.css")),
    "/static/status.js": ("text/javascript; charset=utf-8", _file("status.js")),
}
"""The type and the content of the page's files, by path.

They are read at import, because the confined process cannot read them."""


class _Shown:
    """The page and its data for one collection; each is made when it is first requested."""

    def __init__(self, status: Status, interval_s: float) -> None:
        self.status = status
        self.html: _Body | None = None
        self._interval_s = interval_s

    @cached_property
    def json(self) -> _Body:
        return _Body(to_json(self.status, self._interval_s))


class StatusPages:
    """The status page, its data and its files.

    All requests until the next sample is due share one collection. So the number of
    collections does not depend on the number of open pages.
    """

    def __init__(self, collect: Callable[[], Awaitable[Exposition]], version: str) -> None:
        """Show what ``collect`` returns; it raises SourceError if it fails."""
        self._collect = collect
        self._version = version
        self._settings: Mapping[str, str] = {}
        self._history = History()
        self._has_new_series = False
        """Whether there may be series that were counted before without being selected."""
        self._shown: _Shown | None = None
        self._next_s = 0.0
        self._watched_until_s = 0.0

    def show_settings(self, settings: Mapping[str, str]) -> None:
        """Replace the settings that the page shows; callable from any thread."""
        self._settings = dict(settings)
        self._has_new_series = True
        if shown := self._shown:
            shown.html = None

    async def keep_sampling(self, is_ready: Callable[[], bool]) -> None:
        """Take a sample whenever one is due, also if no browser requests the page.

        After a failure the next sample is due as usual: metrics do not depend on samples.
        """
        while True:
            if is_ready() and time.monotonic() >= self._due_s():
                try:
                    await self._current()
                except Exception as error:
                    self._next_s = time.monotonic() + INTERVAL_S
                    # ``collect`` has logged a SourceError itself.
                    if not isinstance(error, SourceError):
                        log.error("cannot keep a sample: %s", reason(error))  # noqa: TRY400
                        log.debug("cannot keep a sample", exc_info=error)
            await asyncio.sleep(max(self._due_s() - time.monotonic(), 1))

    def _due_s(self) -> float:
        """Return when the next sample is due without a request, on the monotonic clock."""
        if self._next_s < self._watched_until_s:
            return self._next_s
        return self._next_s + UNWATCHED_S - INTERVAL_S

    async def page(self, request: Request, pending: str | None) -> Response:
        """Return the page; ``pending`` says why there is no data yet."""
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY}
        self._watched_until_s = time.monotonic() + WATCHED_FOR_S
        try:
            shown = None if pending else await self._current()
        except SourceError as error:
            shown, pending = None, str(error)
        if shown is None:
            body = _Body(self._html(None, pending or ""))
        else:
            shown.html = shown.html or _Body(self._html(shown.status, ""))
            body = shown.html
        return _answer(request, body, "text/html; charset=utf-8", headers)

    async def data(self, request: Request, pending: str | None) -> Response:
        """Return the data of the page as JSON."""
        if pending:
            return text(503, f"not ready: {pending}")
        self._watched_until_s = time.monotonic() + WATCHED_FOR_S
        try:
            shown = await self._current()
        except SourceError as error:
            return text(503, str(error))
        return _answer_if_changed(request, shown.json, "application/json")

    async def file(self, request: Request, path: str) -> Response:
        """Return a file of `FILES`."""
        content_type, body = FILES[path]
        return _answer_if_changed(request, body, content_type)

    async def _current(self) -> _Shown:
        """Return the page of the last sample; first take a new sample if one is due."""
        shown = self._shown
        if shown and time.monotonic() < self._next_s:
            return shown
        exposition = await self._collect()
        if self._shown and self._shown is not shown:
            return self._shown  # another request has used the same collection
        began_s = time.monotonic()
        if self._has_new_series:
            self._has_new_series = False
            self._history.restart_rates()
        collected = read(exposition.families)
        sample(collected, self._history, began_s)
        status = summarize(collected, self._history, began_s)
        took_s = time.monotonic() - began_s + collected.took_s
        interval_s = max(INTERVAL_S, took_s / IDLE_SHARE)
        self._shown = shown = _Shown(status, interval_s)
        self._next_s = began_s + interval_s
        return shown

    def _html(self, status: Status | None, trouble: str) -> bytes:
        return to_html(
            status,
            version=self._version,
            settings=self._settings,
            reload_s=RELOAD_S,
            trouble=trouble,
        )


def _answer_if_changed(request: Request, body: _Body, content_type: str) -> Response:
    """Return the body, or 304 if the browser says that it has it."""
    headers = {"etag": body.etag, "cache-control": "no-cache"}
    if body.etag in request.header("if-none-match"):
        return Response(304, b"", headers={**_VARY, **headers})
    return _answer(request, body, content_type, headers)


def _answer(
    request: Request, body: _Body, content_type: str, headers: Mapping[str, str]
) -> Response:
    both = {**_VARY, **headers}
    if not prefers_gzip(request.header("accept-encoding")):
        return Response(200, body.body, content_type, both)
    both["content-encoding"] = "gzip"
    return Response(200, body.compressed, content_type, both)
