# SPDX-License-Identifier: GPL-3.0-only
"""Writes the picture of the status page in the README: make screenshot."""

import contextlib
import shutil
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.kernel.helpers.cgroups import new_cgroup
from tests.kernel.test_owners import entered
from tests.support import Exporter, Peers, inside, new_netns

PICTURE = Path(__file__).parents[2] / "docs/status-page.png"

SERVICES = (
    ("nginx.service", 443, 131),
    ("nginx.service", 80, 17),
    ("chat.service", 8443, 67),
    ("postgresql@15-main.service", 5432, 23),
    ("ssh.socket", 22, 3),
)
"""Units, their ports, and the connections to each."""

MINUTES = 2
"""How long connections open and close before the picture."""


def main() -> None:
    with contextlib.ExitStack() as opened:
        opened.enter_context(inside(opened.enter_context(new_netns())))
        served = []
        for unit, port, count in SERVICES:
            cgroup = opened.enter_context(new_cgroup(unit))
            with entered(cgroup):
                peers = opened.enter_context(Peers("127.0.0.1", port))
            peers.connect(count)
            served.append(peers)
        exporter = opened.enter_context(
            Exporter(
                *("--labels", "port,unit", "--histograms", "--reconcile-interval", "5"),
                *("--expect", "database=remote=127.0.0.1:5432,min=20"),
                *("--expect", "queue=remote=192.0.2.7:5672"),
            )
        )
        _churn(served[0], served[2])
        playwright = opened.enter_context(sync_playwright())
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 606})
        page.goto(f"http://127.0.0.1:{exporter.port}/")
        page.wait_for_function("document.querySelector('th button')")
        time.sleep(7)
        page.screenshot(path=PICTURE)
        browser.close()


def _churn(rising: Peers, falling: Peers) -> None:
    """Open connections to one service and close those of another, for `MINUTES`."""
    until_s = time.monotonic() + 60 * MINUTES
    while time.monotonic() < until_s:
        rising.connect(3)
        for end in falling.pairs.pop() if len(falling.pairs) > 7 else ():
            end.close()
        time.sleep(2)


if __name__ == "__main__":
    main()
