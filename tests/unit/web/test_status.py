# SPDX-License-Identifier: GPL-3.0-only
"""The status page without a browser: its content, its data, and when it collects."""

import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tcpexporter.errors import SourceError
from tcpexporter.metrics.exposition import Exposition
from tcpexporter.metrics.series_family import LabelSets, SeriesFamily
from tcpexporter.web.status import StatusPages
from tcpexporter.web.status_page import WIDTH
from tests.unit.web.support import Flaky, Start, ask, make_app

DATA = "/api/v1/connections"
HOSTILE = '<script>alert("1")</script>&amp;'


class Page(HTMLParser):
    """Parses a page: checks that elements are closed in order; collects links and text."""

    void = ("meta", "link", "br", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class Connections(Collector):
    """Publishes what the status page reads."""

    def __init__(self, *rows: tuple[str, int, int]) -> None:
        """Have a port, its connections and its long-term connections in each row."""
        self.rows = rows
        self.collections = 0

    def collect(self) -> Iterator[Metric]:
        self.collections += 1
        labels = LabelSets(("port",), [(port,) for port, *_ in self.rows])
        for name, kind, at in (
            ("tcp_established_connections", "gauge", 1),
            ("netstat_tcp_longterm_connections_total", "gauge", 2),
            ("tcp_connections_opened", "counter", 1),
            ("tcp_connections_closed", "counter", 2),
        ):
            numbers = [int(row[at]) for row in self.rows]
            yield SeriesFamily(name, "", kind, labels, numbers)
        rules = LabelSets(("name",), [("db",), ("queue",)])
        for name, pair in (
            ("tcp_expected_connections", [3, 1]),
            ("tcp_expected_longterm_connections", [2, 0]),
            ("tcp_expected_minimum", [2, 1]),
        ):
            yield SeriesFamily(name, "", "gauge", rules, pair)
        yield GaugeMetricFamily("tcpexporter_uncertain_connections", "", 7)
        yield GaugeMetricFamily("tcpexporter_duration_seconds", "", 6)


def test_the_page_is_complete_without_a_script(start: Start) -> None:
    """The tiles, the expected connections, the rows and the settings are in the HTML."""
    collector = Connections(("443", 1377, 1300), ("80", 5, 0))
    settings = {"--port": "80,443", "--conf": "", "<b>user": HOSTILE}
    answer = ask(start(make_app(collector, settings=settings)), "/")
    page = Page(answer.body.decode())
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert page.open == []
    for text in (
        "1.2.3",
        "1,382",
        "1,300",
        "±7",
        "up to 7 uncertain",
        "80,443",
        "not set",
    ):
        assert text in page.text
    assert "✓ db: 2, at least 2" in page.text
    assert "✗ missing: queue: 0, at least 1" in page.text
    assert HOSTILE in page.text
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert page.tags.count("rect") == 3
    assert f'width="{WIDTH * 77 / 1377:.1f}"' in answer.body.decode()


def test_the_policy_permits_files_of_the_exporter_only(start: Start) -> None:
    """Neither scripts nor styles within the page would run: it shows texts of users."""
    answer = ask(start(make_app(Connections())), "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "style=" not in answer.body.decode()
    assert "<style" not in answer.body.decode()


@pytest.mark.parametrize(("name", "kind"), [("css", "text/css"), ("js", "text/javascript")])
def test_a_file_is_sent_once(start: Start, name: str, kind: str) -> None:
    """The browser asks with the ETag of its copy; the answer is 304 without a body."""
    port = start(make_app())
    path = f"/static/status.{name}"
    answer = ask(port, path)
    assert answer.headers["content-type"].startswith(kind)
    assert len(answer.body) < 15_000
    again = ask(port, path, if_none_match=answer.headers["etag"])
    assert (again.status, again.body) == (304, b"")


def test_the_data_are_json(start: Start) -> None:
    """They have the values of the page, and the rows with most connections come first."""
    port = start(make_app(Connections(("80", 5, 0), ("443", 1377, 1300))))
    answer = ask(port, DATA)
    assert answer.headers["content-type"] == "application/json"
    data = json.loads(answer.body)
    assert [row[:3] for row in data["rows"]] == [[["443"], 1377, 1300], [["80"], 5, 0]]
    assert data["rows"][0][6] == [77, 1300]
    assert data["connections"] == 1382
    assert (data["clients"], data["uncertain"], data["trust"]) == (None, 7, "±7")
    assert [each["is_met"] for each in data["expected"]] == [False, True]
    packed = ask(port, DATA, accept_encoding="gzip")
    assert gzip.decompress(packed.body) == answer.body


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_unchanged_data_are_not_sent_again(start: Start, encoding: str) -> None:
    """The validator is weak: it does not say which of two encodings the browser has."""
    port = start(make_app(Connections(("443", 7, 5))))
    etag = ask(port, DATA, accept_encoding=encoding).headers["etag"]
    assert etag.startswith('W/"')
    for known in (etag, f'"other", {etag}'):
        again = ask(port, DATA, if_none_match=known)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["vary"] == "Accept-Encoding"
    assert ask(port, DATA, if_none_match='"other"').status == 200


def test_open_pages_add_no_collections(start: Start) -> None:
    """Requests within an interval have the same data, also if they come at once."""
    collector = Connections(("443", 7, 5))
    port = start(make_app(collector))
    bodies = [ask(port, DATA).body for _ in range(11)]
    threads = [threading.Thread(target=ask, args=(port, DATA)) for _ in range(13)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert {*bodies} == {bodies[0]}
    assert collector.collections == 1


def test_without_data_the_page_says_why(start: Start) -> None:
    """A browser loads it again after RELOAD_S, with and without JavaScript."""
    flaky = Flaky()
    flaky.error = OSError("no sock_diag")
    port = start(make_app(flaky))
    page = ask(port, "/")
    assert page.status == 200
    assert b"no sock_diag" in page.body
    assert b'http-equiv="refresh"' in page.body
    assert b"<script" not in page.body
    assert ask(port, DATA).status == 503


def test_before_the_exporter_is_ready_there_is_no_data(start: Start) -> None:
    """The numbers would be too low."""
    collector = Connections(("443", 7, 5))
    port = start(make_app(collector, ready=lambda: "the tables are being read"))
    assert b"the tables are being read" in ask(port, "/").body
    assert ask(port, DATA).status == 503
    assert collector.collections == 0


def test_reloaded_settings_are_shown(start: Start) -> None:
    """The next request shows the new settings."""
    app = make_app(Connections(), settings={"--duration": "6"})
    port = start(app)
    assert b"<td>6</td>" in ask(port, "/").body
    app.status.show_settings({"--duration": "61"})
    assert b"<td>61</td>" in ask(port, "/").body


def test_samples_are_taken_without_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Samples continue after any failure; before the exporter is ready, there are none.

    A failure of the source is not logged here, because the collection logs it. Any other
    failure is.
    """
    for name in ("UNWATCHED_S", "INTERVAL_S"):
        monkeypatch.setattr(f"tcpexporter.web.status.{name}", 0)
    results: list[Exception | Exposition] = [
        SourceError("no sock_diag"),
        ZeroDivisionError("not expected"),
        Exposition(Connections(("443", 7, 5)).collect()),
    ]
    collected: list[object] = []

    async def collect() -> Exposition:
        result = results[len(collected)]
        collected.append(result)
        if isinstance(result, Exception):
            raise result
        return result

    pages = StatusPages(collect, "1.2.3")

    async def run(*, is_ready: bool) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pages.keep_sampling(lambda: is_ready), 2.5)

    asyncio.run(run(is_ready=False))
    assert collected == []
    asyncio.run(run(is_ready=True))
    assert len(collected) == 3
    assert caplog.messages == ["cannot keep a sample: ZeroDivisionError: not expected"]
