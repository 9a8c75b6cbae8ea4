# SPDX-License-Identifier: GPL-3.0-only
"""Runs the installed command, and a real Prometheus that scrapes it."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support import DEADLINE_S, Exporter, free_port

COMMAND = str(Path(sys.executable).with_name("tcpexporter"))
README = Path(__file__).parents[2] / "README.md"


class Command(Exporter):
    """The installed command, as a user runs it."""

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (COMMAND,),
        address: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        super().__init__(
            *arguments, command=command, address=address, port=port or 0, wait=False
        )
        self.wait_until_ready()

    @property
    def target(self) -> str:
        return f"{self._address}:{self.port}"

    def fetch(self, path: str, **headers: str) -> tuple[str, str]:
        """Request a page with these headers; return the body and the content type."""
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{self.target}{path}", headers=headers),
            timeout=DEADLINE_S,
        ) as response:
            return response.read().decode(), response.headers["content-type"]


def tool(name: str) -> str:
    """Return the path of a program; skip the test if the program is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH: Debian has it in the package prometheus")
    return path


def scrape_config(*targets: str, **settings: object) -> str:
    """Return the README's scrape_configs with other targets and with additional
    settings."""
    blocks = re.findall("(?ms)^```yaml\n(.*?)^```$", README.read_text())
    (example,) = (block for block in blocks if "\nscrape_configs:" in block)
    before, place, after = example.partition('["localhost:9690"]')
    assert place, "the README's scrape_configs has no localhost:9690"
    more = "".join(f"    {key}: {json.dumps(each)}\n" for key, each in settings.items())
    return f"{before}{json.dumps(targets)}{after}{more}"


class Prometheus:
    """Runs a real Prometheus on loopback, with its data in a directory.

    It delays its first scrape by five seconds, whatever the interval is.
    """

    def __init__(
        self,
        directory: Path,
        *targets: str,
        interval_s: int = 1,
        rules: str = "",
        **settings: object,
    ) -> None:
        """Scrape these targets; ``rules`` is the text of a file of rules."""
        config = directory / "prometheus.yml"
        (directory / "test.rules.yml").write_text(rules or "groups: []\n")
        config.write_text(
            f"global:\n  scrape_interval: {interval_s}s\n"
            f"  evaluation_interval: {interval_s}s\n"
            f"rule_files: [test.rules.yml]\n{scrape_config(*targets, **settings)}"
        )
        self.address = f"127.0.0.1:{free_port()}"
        self._log = directory / "prometheus.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={config}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self.address}",
                    "--log.level=debug",  # failed scrapes are logged at this level
                ],
                stdout=log,
                stderr=log,
            )

    def targets(self) -> list[dict[str, Any]]:
        """Return the targets with their URL, health and last error."""
        return list(self._ask("targets")["activeTargets"])

    def types(self, metric: str) -> set[str]:
        """Return the types that the targets report for a metric family."""
        return {each["type"] for each in self._ask("targets/metadata", metric=metric)}

    def query(self, promql: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return the current result of a query, by the values of these labels."""
        found = self._ask("query", query=promql)["result"]
        values: dict[tuple[str, ...], float] = {}
        for each in found:
            key = tuple(each["metric"].get(label, "") for label in labels)
            values[key] = float(each["value"][1])
        assert len(values) == len(found), f"{labels} do not distinguish {found}"
        return values

    def query_range(
        self, promql: str, start_s: float, end_s: float, step_s: float
    ) -> dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]:
        """Return the times (s) and values of each series of the result, by its labels."""
        found = self._ask(
            "query_range", query=promql, start=start_s, end=end_s, step=step_s
        )["result"]
        return {
            tuple(each["metric"].items()): [
                (at_s, float(value)) for at_s, value in each["values"]
            ]
            for each in found
        }

    def failed_scrapes(self) -> list[str]:
        """Return the log lines about failed scrapes, each with the reason."""
        return [
            line for line in self._log.read_text().splitlines() if "Scrape failed" in line
        ]

    def samples(self, selector: str) -> list[tuple[float, float]]:
        """Return the samples of one series: seconds since the epoch, and value."""
        (series,) = self._ask("query", query=f"{selector}[10m]")["result"]
        return [(scraped_s, float(value)) for scraped_s, value in series["values"]]

    def wait_for(
        self, promql: str, expected: dict[tuple[str, ...], float], *labels: str
    ) -> None:
        """Wait until a query has the expected result."""
        until = time.monotonic() + DEADLINE_S
        while (found := self.query(promql, *labels)) != expected:
            assert time.monotonic() < until, (
                f"{promql} by {labels} should be {expected}, is {found}; last errors: "
                f"{[each['lastError'] for each in self.targets()]}"
            )
            time.sleep(0.1)

    def _ask(self, path: str, **parameters: str | float) -> Any:
        query = urllib.parse.urlencode(parameters)
        return json.loads(self._get(f"/api/v1/{path}?{query}"))["data"]

    def _get(self, path: str) -> bytes:
        url = f"http://{self.address}{path}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
            body: bytes = response.read()
            return body

    def wait_until_ready(self) -> None:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._get("/-/ready")
                return
            time.sleep(0.05)
        raise AssertionError(f"Prometheus does not get ready:\n{self._log.read_text()}")

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
