# SPDX-License-Identifier: GPL-3.0-only
"""The distribution's Chromium, driven by Playwright; each test has a page of its own."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support import inside, new_netns

SIZE = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium in a network namespace of its own, for the tests of one module.

    Until it ends, Playwright runs an event loop in this thread, so that no test of
    another module could run one.
    """
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not on PATH: Debian has it in the package chromium")
    with new_netns() as netns, inside(netns), sync_playwright() as playwright:
        # The sandbox requires another user than root.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def complaints() -> list[str]:
    """Return the list of errors in the page's console, which must be empty at the end."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    with browser.new_context(viewport=SIZE) as context:  # type: ignore[arg-type]
        opened = context.new_page()
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on(
            "console",
            lambda line: complaints.append(line.text) if line.type == "error" else None,
        )
        yield opened
    assert complaints == []
