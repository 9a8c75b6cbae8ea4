# SPDX-License-Identifier: GPL-3.0-only
"""HTTP/1.1 without sockets: which input is parsed, discarded or refused."""

from http import HTTPStatus

import pytest

from tcpexporter.web.http1 import Http1, InvalidRequestError, text
from tests.unit.web.support import HEALTHY, LOOPBACK

MAX_HEAD_BYTES, MAX_IGNORED_BYTES = 4099, 1009


def received(*parts: bytes) -> Http1:
    http1 = Http1(LOOPBACK, MAX_HEAD_BYTES, MAX_IGNORED_BYTES)
    for part in parts:
        http1.receive(part)
    return http1


def test_a_request_is_parsed() -> None:
    """Header names are in lower case, and the lines of one name are joined."""
    http1 = received(b"GET /a?b HTTP/1.1\r\nHost: x\r\nACCEPT: c\r\naccept: d\r\n\r\n")
    assert (request := http1.next_request())
    assert (request.method, request.target, request.query) == ("GET", "/a", "b")
    assert (request.version, request.client) == ("1.1", LOOPBACK)
    assert (request.header("accept"), request.header("cookie")) == ("c,d", "")
    assert http1.has_request


def test_the_next_request_waits_for_the_response() -> None:
    """Pipelined requests are not read further; after the response comes the next one."""
    http1 = received(HEALTHY, HEALTHY)
    assert http1.next_request()
    assert http1.next_request() is None
    assert not http1.accepts_data
    http1.encode(text(200, "healthy"))
    assert http1.has_response
    http1.start_next()
    assert http1.next_request()
    assert http1.next_request() is None
    assert http1.accepts_data


@pytest.mark.parametrize(
    ("framing", "chunk"),
    [
        ("Content-Length: 5003", bytes(500)),
        ("Transfer-Encoding: chunked", b"1f4\r\n" + bytes(500) + b"\r\n"),
    ],
)
def test_a_body_is_discarded(framing: str, chunk: bytes) -> None:
    """It is read up to a limit, and the response closes the connection."""
    http1 = received(f"POST / HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    assert http1.next_request()
    for number in range(1, 4):
        http1.receive(chunk)
        assert http1.next_request() is None
        assert http1.accepts_data == (number * 500 <= MAX_IGNORED_BYTES)
    assert not http1.has_incomplete_request
    head, _ = http1.encode(text(405, "no"))
    assert b"\r\nconnection: close\r\n" in head
    assert http1.must_close


def test_bytes_after_the_last_request_are_discarded() -> None:
    """Some clients send a line end after a body. That is not an invalid request."""
    http1 = received(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert http1.next_request()
    assert http1.next_request() is None
    http1.receive(b"\r\n")
    assert http1.next_request() is None
    assert http1.accepts_data
    http1.receive(bytes(MAX_IGNORED_BYTES))
    assert http1.next_request() is None
    assert not http1.accepts_data
    http1.encode(text(200, "healthy"))
    assert http1.must_close


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01", 400),
        (b"GET / HTTP/1.1\r\nX: " + bytes(MAX_HEAD_BYTES), 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_data_that_is_not_a_request_is_refused(sent: bytes, status: int) -> None:
    """The error has the status of the response, which closes the connection."""
    http1 = received(sent)
    with pytest.raises(InvalidRequestError) as refused:
        http1.next_request()
    assert refused.value.status is HTTPStatus(status)
    assert not http1.has_request
    head, body = http1.encode(text(status, "refused", connection="close"))
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert body == b"refused\n"
    assert http1.must_close
