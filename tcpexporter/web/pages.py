# SPDX-License-Identifier: GPL-3.0-only
"""Makes the response to each request: routes, pages and readiness."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from tcpexporter.errors import SourceError, enough_memory, reason
from tcpexporter.metrics.exposition import Collections, Exposition, negotiate
from tcpexporter.metrics.negotiation import prefers_gzip
from tcpexporter.web.fair_share import source_network
from tcpexporter.web.http1 import Request, Response, text
from tcpexporter.web.status import FILES, StatusPages
from tcpexporter.web.targets import clean, is_host, location, path_of

if TYPE_CHECKING:  # saves the memory of bcrypt and ssl when there is no --web-config
    from tcpexporter.web.guard import Guard

log = logging.getLogger(__name__)


_ALLOW = {"allow": "GET, HEAD"}

_REFUSALS = {
    HTTPStatus.UNAUTHORIZED: text(
        401,
        "authentication required",
        **{"www-authenticate": 'Basic realm="tcpexporter", charset="UTF-8"'},
    ),
    HTTPStatus.TOO_MANY_REQUESTS: text(429, "too many requests: rate_limit exceeded"),
    HTTPStatus.SERVICE_UNAVAILABLE: text(
        503, "cannot check the password now: try again", **{"retry-after": "1"}
    ),
}
"""Responses to requests that `Guard.authorize` refuses, by the status it returns."""


class App:
    """The application: makes the response to each request."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        ready: Callable[[], str | None],
        settings: Mapping[str, str],
        version: str,
        guard: "Guard | None" = None,
    ) -> None:
        """Serve the metrics of a registry.

        Args:
            registry: Collected in the event loop; concurrent scrapes share a collection.
            ready: Returns None if metrics can be served, otherwise what must happen before.
            settings: Shown on the status page.
            version: Shown on the status page.
            guard: Authorizes each request; None permits all of them.
        """
        self._collections = Collections(registry)
        self.guard = guard
        self._ready = ready
        self.status = StatusPages(self.collect, version)
        self.status.show_settings(settings)
        self._trouble: str | None = None
        self._has_worked = False
        self._pages: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._status_page,
            "/api/v1/connections": self._status_data,
            **dict.fromkeys(FILES, self._file),
            "/metrics": self._metrics,
            "/-/healthy": self._health,
            "/-/ready": self._readiness,
        }

    async def check(self) -> str | None:
        """Return why metrics cannot be served, or None if they can.

        It collects as for a scrape, unless a collection has succeeded since the last check.
        """
        if pending := self._ready():
            return pending
        try:
            if not self._has_worked:
                await self.collect()
        except SourceError as error:
            return str(error)
        self._has_worked = False
        return None

    async def respond(self, request: Request) -> Response:
        """Return the response to a request."""
        response = (
            _objection(request) or await self._refusal(request) or await self._page(request)
        )
        if self.guard is None:
            return response
        return replace(response, headers={**response.headers, **self.guard.headers})

    async def collect(self) -> Exposition:
        """Return an exposition collected after this call; concurrent callers share it.

        Raises:
            SourceError: collecting failed, for any reason.
        """
        try:
            exposition = await self._collections.next()
        except Exception as error:
            self._record_trouble(reason(error))
            log.debug("cannot collect metrics", exc_info=error)
            raise SourceError(reason(error)) from error
        self._record_trouble(None)
        self._has_worked = True
        return exposition

    async def _refusal(self, request: Request) -> Response | None:
        if self.guard is None:
            return None
        authorization = request.header("authorization")
        network = source_network(request.client)
        return _REFUSALS.get(await self.guard.authorize(authorization, network))

    async def _page(self, request: Request) -> Response:
        # A request about the whole server: RFC 9110, section 9.3.7.
        if (request.method, request.target) == (
            "OPTIONS",
            "*",
        ):
            return Response(200, b"", headers=_ALLOW)
        if request.method not in ("GET", "HEAD"):
            return text(405, "only GET and HEAD are allowed", **_ALLOW)
        path = path_of(request.target)
        if path is None:
            return text(400, "the request target is neither a path nor a URL")
        if path != (cleaned := clean(path)):
            target = location(cleaned, request.query)
            return text(301, f"moved permanently: {target}", location=target)
        if page := self._pages.get(path):
            return await page(request)
        return text(404, "not found: metrics are at /metrics")

    async def _status_page(self, request: Request) -> Response:
        return await self.status.page(request, self._ready())

    async def _status_data(self, request: Request) -> Response:
        return await self.status.data(request, self._ready())

    async def _file(self, request: Request) -> Response:
        return await self.status.file(request, path_of(request.target) or "")

    async def _health(self, _request: Request) -> Response:
        return text(200, "healthy")

    async def _readiness(self, _request: Request) -> Response:
        pending = self._ready()
        return text(503, f"not ready: {pending}") if pending else text(200, "ready")

    async def _metrics(self, request: Request) -> Response:
        readiness = await self._readiness(request)
        if readiness.status != 200:
            return readiness
        try:
            exposition = await self.collect()
            with enough_memory():
                return _exposition_response(exposition, request)
        except SourceError as error:
            return text(503, str(error))

    def _record_trouble(self, trouble: str | None) -> None:
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble:
            log.error("cannot collect metrics: %s", trouble)
        else:
            log.info("collecting metrics works again")


def _objection(request: Request) -> Response | None:
    """Return the refusal of a request whose version or headers are invalid, else None."""
    if not request.version.startswith("1."):
        return text(505, "only HTTP/1.0 and HTTP/1.1 are supported", connection="close")
    if not is_host(request.header("host")):
        return text(400, "the Host header is invalid")
    if request.header("expect").lower() not in ("", "100-continue"):
        return text(417, "the only expectation supported is 100-continue")
    return None


def _exposition_response(exposition: Exposition, request: Request) -> Response:
    form = negotiate(request.header("accept"))
    query = parse_qs(request.query)
    if names := query.get("name[]"):
        # Not compressed: each selection of names would have to be compressed separately.
        vary = {"vary": "Accept"}
        return Response(200, exposition.body(form, names), form.content_type, vary)
    vary = {"vary": "Accept, Accept-Encoding"}
    if not prefers_gzip(request.header("accept-encoding")):
        return Response(200, exposition.body(form), form.content_type, vary)
    headers = {"content-encoding": "gzip", **vary}
    return Response(200, exposition.compressed(form), form.content_type, headers)
