# SPDX-License-Identifier: GPL-3.0-only
"""The content of the landing page."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from tests.unit.web.support import (
    Start,
    ask,
    make_app,
)


class Page(HTMLParser):
    """Parses a page: checks that elements are closed in order; collects links and text."""

    void = ("meta", "link", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_landing_page_has_version_settings_and_links(start: Start) -> None:
    """The settings are escaped."""
    hostile = '<script>alert("1")</script>&amp;'
    settings = {"ports": (80, 443), "conf": None, "<b>user": hostile}
    port = start(make_app(settings=settings))
    answer = ask(port, "/")
    page = Page(answer.body.decode())
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert page.open == []
    assert "script" not in page.tags
    assert "b" not in page.tags
    for text in ("1.2.3", "ports", "80, 443", "not set", "<b>user", hostile):
        assert text in page.text
    assert page.links == ["metrics", "-/healthy", "-/ready"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_style_of_the_landing_page_is_permitted(start: Start) -> None:
    """The content security policy has the hash of the page's style."""
    answer = ask(start(make_app()), "/")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.body.decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in answer.headers["content-security-policy"]


def test_reloaded_settings_are_shown(start: Start) -> None:
    """The next request shows the new settings."""
    app = make_app(settings={"duration_s": 6})
    port = start(app)
    app.show_settings({"duration_s": 61})
    assert b"<td>61</td>" in ask(port, "/").body
