# SPDX-License-Identifier: GPL-3.0-only
"""Parses HTTP/1.1 requests from received bytes, and writes responses as bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

import h11


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request."""

    method: str
    target: str
    """The request target without its query."""
    query: str
    version: str
    headers: Sequence[tuple[bytes, bytes]]
    """Names are in lower case."""
    client: str
    """The client's IP address."""

    def header(self, name: str) -> str:
        """Return the values of a header's lines, joined by commas; empty without any."""
        key = name.encode()
        return b",".join(value for each, value in self.headers if each == key).decode(
            "latin-1"
        )


@dataclass(frozen=True)
class Response:
    """A response, without the headers that `Http1.encode` adds to all of them."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


def text(status: int, sentence: str, **headers: str) -> Response:
    """Return a response with a sentence as plain text."""
    return Response(status, f"{sentence}\n".encode(), headers=headers)


class InvalidRequestError(Exception):
    """A client has sent data that is not a valid request."""

    def __init__(self, status: HTTPStatus) -> None:
        """Keep the status of the response to the client."""
        super().__init__(status.phrase)
        self.status = status


class Http1:
    """The state of HTTP/1.1 with one client, without input and output."""

    def __init__(self, client: str, max_head_bytes: int, max_ignored_bytes: int) -> None:
        """Wait for the first request.

        Args:
            client: The client's IP address.
            max_head_bytes: Longer request heads are invalid.
            max_ignored_bytes: Limit for bytes of bodies, which are discarded. Beyond it,
                `accepts_data` is false.
        """
        self._h11 = h11.Connection(h11.SERVER, max_head_bytes)
        self._client = client
        self._max_ignored_bytes = max_ignored_bytes
        self._ignored_bytes = 0
        self._has_body = False
        self._is_head = False
        self._is_paused = False

    @property
    def has_request(self) -> bool:
        """Whether a request waits for its response."""
        return self._h11.our_state is h11.SEND_RESPONSE

    @property
    def has_response(self) -> bool:
        """Whether a response has been encoded, and `start_next` may be called."""
        return self._h11.our_state is h11.DONE

    @property
    def has_incomplete_request(self) -> bool:
        """Whether a part of a request has been received."""
        return bool(self._h11.trailing_data[0])

    @property
    def must_close(self) -> bool:
        """Whether no request can follow the response that has been encoded."""
        return self._h11.our_state is h11.MUST_CLOSE

    @property
    def accepts_data(self) -> bool:
        """Whether to receive more data before the response to the current request."""
        return not self._is_paused and self._ignored_bytes <= self._max_ignored_bytes

    def receive(self, data: bytes) -> None:
        """Store received bytes for `next_request`; ignore bytes after the last request."""
        if self._h11.their_state is h11.MUST_CLOSE:
            self._ignored_bytes += len(data)
        else:
            self._h11.receive_data(data)

    def next_request(self) -> Request | None:
        """Return the next request if its head is complete, else None. Discard its body.

        Raises:
            InvalidRequestError: the client has sent data that is not a valid request.
        """
        try:
            while self._h11.their_state is not h11.MUST_CLOSE:
                event = self._h11.next_event()
                if isinstance(event, h11.Request):
                    return self._begin(event)
                if isinstance(event, h11.Data):
                    self._ignored_bytes += len(event.data)
                elif event is h11.PAUSED or event is h11.NEED_DATA:
                    self._is_paused = event is h11.PAUSED
                    break
        except h11.RemoteProtocolError as error:
            raise InvalidRequestError(HTTPStatus(error.error_status_hint)) from error
        return None

    def encode(self, response: Response) -> tuple[bytes, bytes]:
        """Return the head and the body of a response as bytes to send."""
        headers = {
            "date": formatdate(usegmt=True),
            "content-type": response.content_type,
            "content-length": str(len(response.body)),
            **response.headers,
        }
        if self._has_body:
            # The response does not wait for the whole body, so no request can follow.
            headers["connection"] = "close"
        head = self._h11.send(
            h11.Response(
                status_code=response.status,
                headers=[(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
                reason=HTTPStatus(response.status).phrase.encode(),
            )
        )
        body = b"" if self._is_head else response.body
        self._h11.send(h11.Data(data=body))
        self._h11.send(h11.EndOfMessage())
        return head, body

    def start_next(self) -> None:
        """After a response, wait for the next request on the same connection."""
        self._h11.start_next_cycle()
        self._is_head = False

    def _begin(self, event: h11.Request) -> Request:
        target, _, query = event.target.decode("ascii").partition("?")
        request = Request(
            event.method.decode("ascii"),
            target,
            query,
            event.http_version.decode("ascii"),
            event.headers,
            self._client,
        )
        self._is_head = request.method == "HEAD"
        self._has_body = request.header("content-length") not in ("", "0") or bool(
            request.header("transfer-encoding")
        )
        return request
