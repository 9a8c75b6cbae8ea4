# SPDX-License-Identifier: GPL-3.0-only
"""The status page in a real browser, which a real exporter serves."""

import contextlib
import re
import time
from pathlib import Path

import bcrypt
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Locator, Page, expect

from tests.support import Exporter, Peers, eventually

UPDATE_MS = 15_000
"""Within this time an update must come, also on a busy machine."""

FIXED = ("--source", "ebpf", "--duration", "2")


def url(exporter: Exporter) -> str:
    return f"http://127.0.0.1:{exporter.port}/"


def row_of(page: Page, port: int) -> Locator:
    return page.locator("#series tbody tr", has=page.locator(f'td:text-is("{port}")'))


def established(page: Page, port: int) -> Locator:
    """Return the cell with the established connections of a port, which is the third."""
    return row_of(page, port).locator("td").nth(2)


def test_connections_appear_and_disappear_with_the_next_update(page: Page) -> None:
    """The tiles, the expected connection and the row change; the page is not reloaded."""
    with Peers() as peers:
        rule = f"db=local=:{peers.port}"
        with Exporter(*FIXED, "--expect", rule) as exporter:
            page.goto(url(exporter))
            expect(established(page, peers.port)).to_have_text("0")
            expect(page.locator("#expected")).to_have_text(
                re.compile("missing: db: 0, at least 1")
            )
            page.evaluate("window.isTheSame = true")
            peers.connect(7)
            expect(established(page, peers.port)).to_have_text("7", timeout=UPDATE_MS)
            expect(page.locator("#connections")).to_have_text("7")
            expect(page.locator("#trust")).to_have_text("exact")
            text = re.compile("✓ db: 7, at least 1")
            expect(page.locator("#expected")).to_have_text(text, timeout=UPDATE_MS)
            for client, _ in peers.pairs[:4]:
                client.close()
            expect(established(page, peers.port)).to_have_text("3", timeout=UPDATE_MS)
            assert page.evaluate("window.isTheSame")
            ages = row_of(page, peers.port).locator("svg.ages")
            expect(ages).to_have_attribute(
                "aria-label", re.compile("^0 younger than 2 s, 3 ")
            )
            opened = row_of(page, peers.port).locator("td").nth(5)
            expect(opened).not_to_have_text("0")


def test_rows_are_sorted_and_filtered(page: Page) -> None:
    """Rows are sorted by a column with a click or a key, and filtered by any label."""
    with Peers() as few, Peers() as many, Exporter(*FIXED) as exporter:
        few.connect(3)
        many.connect(11)
        page.goto(url(exporter))
        first = page.locator("#series tbody tr").first
        expect(first.locator("td").first).to_have_text(str(many.port), timeout=UPDATE_MS)
        page.get_by_role("button", name="established").press("Enter")
        expect(page.locator('th[aria-sort="ascending"]')).to_have_text("established")
        expect(first.locator("td").nth(2)).to_have_text("3")
        page.locator("#series th button").first.click()
        lowest = min(few.port, many.port)
        expect(first.locator("td").first).to_have_text(str(lowest))
        page.get_by_label("Filter").fill(str(few.port))
        expect(page.locator("#series tbody tr")).to_have_count(1)
        expect(page.locator("#shown")).to_have_text(re.compile("^1 of [0-9]+ series"))
        page.get_by_label("Filter").fill("none of them")
        expect(page.locator("#series tbody tr")).to_have_count(0)


def test_without_javascript_the_page_is_complete(browser: Browser) -> None:
    """It reloads itself; controls that would not work are not shown."""
    with Peers() as peers, Exporter(*FIXED) as exporter:
        peers.connect(5)
        time.sleep(0.5)
        with browser.new_context(java_script_enabled=False) as context:
            page = context.new_page()
            page.goto(url(exporter))
            assert int(established(page, peers.port).inner_text()) in (0, 5)
            assert page.locator('noscript meta[http-equiv="refresh"]').count() == 1
            expect(page.get_by_label("Filter")).to_be_hidden()
            assert page.locator("th button").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 3840])
def test_any_screen_is_readable(browser: Browser, scheme: str, width: int) -> None:
    """axe finds no fault, and nothing but the table is wider than the screen."""
    with Peers() as peers:
        missing = ("--expect", "queue=remote=192.0.2.1:5672")
        rules = ("--expect", f"db=local=:{peers.port}", *missing)
        with Exporter(*FIXED, "--histograms", *rules) as exporter:
            peers.connect(7)
            with browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme=scheme,  # type: ignore[arg-type]
            ) as context:
                page = context.new_page()
                page.goto(url(exporter))
                expect(established(page, peers.port)).to_have_text("7", timeout=UPDATE_MS)
                found = Axe().run(page)
                assert found.violations_count == 0, found.generate_report()
                assert page.evaluate("document.body.scrollWidth") <= width


def is_ready(page: Page, exporter: Exporter) -> bool:
    with contextlib.suppress(Error):
        return bool(page.request.get(f"{url(exporter)}-/ready").ok)
    return False


def test_the_page_works_with_a_password(browser: Browser, tmp_path: Path) -> None:
    """The browser sends the password for the data, too."""
    digest = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    config = tmp_path / "web.yml"
    config.write_text(f"basic_auth_users:\n  alice: {digest}\n")
    guarded = (*FIXED, "--web-config", str(config))
    with Peers() as peers, Exporter(*guarded, wait=False) as exporter:
        with browser.new_context(
            http_credentials={"username": "alice", "password": "secret"}
        ) as context:
            page = context.new_page()
            eventually(lambda: is_ready(page, exporter))
            page.goto(url(exporter))
            peers.connect(3)
            expect(established(page, peers.port)).to_have_text("3", timeout=UPDATE_MS)


def test_two_thousand_series_are_sorted_and_filtered_fast(page: Page) -> None:
    """Sorting and filtering take less than a second, in a browser of a busy machine."""
    count = 1999
    with Exporter(*FIXED, "--port", f"10001-{10000 + count}") as exporter:
        page.goto(url(exporter))
        page.get_by_label("Filter").fill("1099")
        expect(page.locator("#shown")).to_have_text(re.compile("^20 of 2,000 series"))
        page.get_by_label("Filter").fill("")
        began_s = time.monotonic()
        page.locator("#series th button").first.click()
        expect(page.locator("#series tbody tr").first.locator("td").first).to_have_text(
            "10001"
        )
        assert time.monotonic() - began_s < UPDATE_MS / 1000


def test_the_page_says_that_the_exporter_is_gone(page: Page, complaints: list[str]) -> None:
    """It keeps the last numbers, and updates them when the exporter is back."""
    with Peers() as peers:
        with Exporter(*FIXED) as exporter:
            peers.connect(3)
            page.goto(url(exporter))
            expect(established(page, peers.port)).to_have_text("3", timeout=UPDATE_MS)
            port = exporter.port
            exporter.stop()
            stale = page.locator("#stale")
            expect(stale).to_have_text(re.compile("No data"), timeout=UPDATE_MS)
            expect(established(page, peers.port)).to_have_text("3")
        with Exporter(*FIXED, port=port):
            peers.connect(2)
            expect(stale).to_be_hidden(timeout=UPDATE_MS)
            expect(established(page, peers.port)).to_have_text("5", timeout=UPDATE_MS)
    # The browser logs each failed request.
    complaints[:] = [each for each in complaints if "Failed to load resource" not in each]
