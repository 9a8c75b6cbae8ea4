# SPDX-License-Identifier: GPL-3.0-only
"""Serves the pages: routes, responses and readiness, as an ASGI application."""

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from tcpexporter.errors import SourceError, enough_memory, reason
from tcpexporter.metrics.exposition import Collections, Exposition, negotiate
from tcpexporter.metrics.negotiation import prefers_gzip
from tcpexporter.web.fair_share import source_network
from tcpexporter.web.landing import CONTENT_SECURITY_POLICY, landing_page
from tcpexporter.web.targets import clean, is_host, location, path_of

if TYPE_CHECKING:  # saves the memory of bcrypt and ssl when there is no --web-config
    from tcpexporter.web.guard import Guard

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """A response, without the headers that `App` adds to all of them."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def text(status: int, sentence: str, **headers: str) -> Response:
    """Return a response with a sentence as plain text."""
    return Response(status, f"{sentence}\n".encode(), headers=headers)


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
    """The pages, as an ASGI application."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        ready: Callable[[], str | None],
        settings: Mapping[str, object],
        version: str,
        guard: "Guard | None" = None,
    ) -> None:
        """Serve the metrics of a registry.

        Args:
            registry: Collected in the event loop; concurrent scrapes share a collection.
            ready: Returns None if metrics can be served, otherwise what must happen before.
            settings: Shown on the landing page.
            version: Shown on the landing page.
            guard: Authorizes each request; None permits all of them.
        """
        self._collections = Collections(registry)
        self.guard = guard
        self._ready = ready
        self._version = version
        self.show_settings(settings)
        self._trouble: str | None = None
        self._has_worked = False
        self._pages: Mapping[str, Callable[[Scope], Awaitable[Response]]] = {
            "/": self._landing,
            "/metrics": self._metrics,
            "/-/healthy": self._health,
            "/-/ready": self._readiness,
        }

    def show_settings(self, settings: Mapping[str, object]) -> None:
        """Replace the settings that the landing page shows; callable from any thread."""
        self._landing_page = landing_page(self._version, settings).encode()

    async def check(self) -> str | None:
        """Return why metrics cannot be served, or None if they can.

        Collects as for a scrape, unless a scrape has worked since the last check.
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

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Respond to one request."""
        response = (
            _objection(scope) or await self._refusal(scope) or await self._respond(scope)
        )
        headers = {
            "date": formatdate(usegmt=True),
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            **response.headers,
            **(self.guard.headers if self.guard else {}),
        }
        if _has_body(scope):
            # The body is not read, so the start of a next request is unknown.
            headers["connection"] = "close"
        await send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": response.body})

    async def collect(self) -> Exposition:
        """Return an exposition collected after this call; concurrent callers share it.

        Raises:
            SourceError: collecting failed, for whatever reason.
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

    async def _refusal(self, scope: Scope) -> Response | None:
        if self.guard is None:
            return None
        host, _ = scope["client"] or ("", 0)
        authorization = _header(scope, b"authorization")
        return _REFUSALS.get(
            await self.guard.authorize(authorization, source_network(host))
        )

    async def _respond(self, scope: Scope) -> Response:
        target = scope["raw_path"].decode("ascii")
        if (scope["method"], target) == ("OPTIONS", "*"):  # asks about the whole server
            return Response(200, b"", headers=_ALLOW)
        if scope["method"] not in ("GET", "HEAD"):
            return text(405, "only GET and HEAD are allowed", **_ALLOW)
        path = path_of(target)
        if path is None:
            return text(400, "the request target is neither a path nor a URL")
        if path != (cleaned := clean(path)):
            target = location(cleaned, scope["query_string"].decode("ascii"))
            return text(301, f"moved permanently: {target}", location=target)
        if page := self._pages.get(path):
            return await page(scope)
        return text(404, "not found: metrics are at /metrics")

    async def _landing(self, _scope: Scope) -> Response:
        return Response(
            200,
            self._landing_page,
            "text/html; charset=utf-8",
            {"content-security-policy": CONTENT_SECURITY_POLICY},
        )

    async def _health(self, _scope: Scope) -> Response:
        return text(200, "healthy")

    async def _readiness(self, _scope: Scope) -> Response:
        pending = self._ready()
        return text(503, f"not ready: {pending}") if pending else text(200, "ready")

    async def _metrics(self, scope: Scope) -> Response:
        readiness = await self._readiness(scope)
        if readiness.status != 200:
            return readiness
        try:
            exposition = await self.collect()
            with enough_memory():
                return _exposition_response(exposition, scope)
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


def _objection(scope: Scope) -> Response | None:
    """Return the refusal of a request whose version or headers are invalid, else None."""
    if not scope["http_version"].startswith("1."):
        return text(505, "only HTTP/1.0 and HTTP/1.1 are supported", connection="close")
    if not is_host(_header(scope, b"host")):
        return text(400, "the Host header is invalid")
    if _header(scope, b"expect").lower() not in ("", "100-continue"):
        return text(417, "the only expectation supported is 100-continue")
    return None


def _exposition_response(exposition: Exposition, scope: Scope) -> Response:
    form = negotiate(_header(scope, b"accept"))
    query = parse_qs(scope["query_string"].decode("latin-1"))
    if names := query.get("name[]"):
        # Not compressed: each selection of names would have to be compressed separately.
        vary = {"vary": "Accept"}
        return Response(200, exposition.body(form, names), form.content_type, vary)
    vary = {"vary": "Accept, Accept-Encoding"}
    if not prefers_gzip(_header(scope, b"accept-encoding")):
        return Response(200, exposition.body(form), form.content_type, vary)
    headers = {"content-encoding": "gzip", **vary}
    return Response(200, exposition.compressed(form), form.content_type, headers)


def _header(scope: Scope, name: bytes) -> str:
    return b",".join(value for key, value in scope["headers"] if key == name).decode(
        "latin-1"
    )


def _has_body(scope: Scope) -> bool:
    length = _header(scope, b"content-length")
    return length not in ("", "0") or bool(_header(scope, b"transfer-encoding"))
