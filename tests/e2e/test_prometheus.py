# SPDX-License-Identifier: GPL-3.0-only
"""A real Prometheus scrapes the installed command with the README's scrape_configs."""

import contextlib
import itertools
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser

from tests.e2e.support import COMMAND, README, Command, Prometheus
from tests.support import ESTABLISHED, LONG_TERM, Peers, eventually, free_port

ACCEPT = {
    "2.42": "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "3.5": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
}
"""Accept headers of Prometheus, by its version."""

ROOT = Path(__file__).parents[2]

SOURCES = ("ebpf", "sock_diag", "procfs")


def at(port: int, metric: str = LONG_TERM) -> str:
    return f'{metric}{{port="{port}"}}'


def test_prometheus_stores_the_right_counts_of_every_source(tmp_path: Path) -> None:
    """IPv4 and IPv6 have separate counts, which fall when connections close."""
    with contextlib.ExitStack() as running:
        peers = running.enter_context(Peers("::"))
        exporters = [
            running.enter_context(
                Command("--source", source, "--interval", "0.5", "--duration", "1")
            )
            for source in SOURCES
        ]
        prometheus = running.enter_context(
            # The interval is also the timeout of a scrape, and this machine may be busy.
            Prometheus(tmp_path, *(each.target for each in exporters), interval_s=2)
        )

        def wait_for_numbers(four: int, six: int) -> None:
            expected: dict[tuple[str, ...], float] = {
                (source, version): number
                for source in SOURCES
                for version, number in (("4", four), ("6", six))
            }
            with_source = "* on(instance) group_left(source) tcpexporter_source_info"
            query = f"{at(peers.port)} {with_source}"
            prometheus.wait_for(query, expected, "source", "tcp_version")

        peers.connect(7, "127.0.0.1")
        peers.connect(5, "::1")
        wait_for_numbers(7, 5)
        for client, _ in peers.pairs[:3]:
            client.close()
        wait_for_numbers(4, 5)
        for _, server in peers.pairs[7:]:
            server.close()
        wait_for_numbers(4, 0)
        for each in exporters:  # Prometheus' own connections are not counted.
            own = f'{LONG_TERM}{{port="{each.port}",instance="{each.target}"}}'
            assert prometheus.query(own) == {}
        assert_no_scrape_failed(prometheus)
        # Only OpenMetrics has the type info.
        assert prometheus.types("tcpexporter_source") == {"info"}


def assert_no_scrape_failed(prometheus: Prometheus) -> None:
    assert prometheus.failed_scrapes() == []
    assert set(prometheus.query("min_over_time(up[10m])", "instance").values()) == {1}
    for each in prometheus.targets():
        assert each["health"] == "up"
        assert each["lastError"] == ""


def test_the_alert_on_a_lost_connection_fires(tmp_path: Path) -> None:
    """An application loses its database: the shipped rule fires after its ``for``."""
    rules = (ROOT / "deploy/prometheus/tcpexporter.rules.yml").read_text()
    rules = rules.replace("for: 1m", "for: 2s")
    firing = 'ALERTS{alertname="TcpExpectedConnectionMissing", alertstate="firing"}'
    with Peers() as peers:
        rule = f"db=remote=127.0.0.1:{peers.port}"
        peers.connect(1)
        with (
            Command("--duration", "1", "--expect", rule) as exporter,
            Prometheus(tmp_path, exporter.target, rules=rules) as prometheus,
        ):
            expected = 'tcp_expected_longterm_connections{name="db"}'
            prometheus.wait_for(expected, {("db",): 1}, "name")
            assert prometheus.query(firing, "name") == {}
            peers.pairs[0][0].close()
            lost_s = time.monotonic()
            prometheus.wait_for(firing, {("db",): 1}, "name")
            sys.stdout.write(f"fired after {time.monotonic() - lost_s:.1f} s\n")
            peers.connect(1)
            prometheus.wait_for(firing, {}, "name")


def test_an_ipv6_target_is_scraped(tmp_path: Path) -> None:
    """With ``--listen '[::1]:port'`` Prometheus scrapes over IPv6."""
    with (
        Peers("::1") as peers,
        Command("--duration", "0", address="[::1]") as exporter,
        Prometheus(tmp_path, exporter.target) as prometheus,
    ):
        peers.connect(3)
        prometheus.wait_for(at(peers.port), {("6",): 3}, "tcp_version")
        (target,) = prometheus.targets()
        assert target["scrapeUrl"] == f"http://[::1]:{exporter.port}/metrics"
        assert_no_scrape_failed(prometheus)


def test_the_example_of_the_readme_works_unchanged(tmp_path: Path) -> None:
    """The command without flags serves at the target of the README's example."""
    no_flag = ("sh", "-c", f'exec "{COMMAND}"')  # sh does not pass the flags to the command
    with (
        Peers() as peers,
        Command(command=no_flag, port=9690) as exporter,
        Prometheus(tmp_path, "localhost:9690") as prometheus,
    ):
        peers.connect(3)
        prometheus.wait_for(at(peers.port, ESTABLISHED), {("4",): 3}, "tcp_version")
        assert exporter.value("tcpexporter_duration_seconds") == 6


def test_the_check_of_the_readme_counts_its_connection() -> None:
    """The README shows the line of the connection that its command holds."""
    (held,) = re.findall(r"(?m)^    python3 (-c .*) &$", README.read_text())
    (line,) = re.findall(r"(?m)^This prints `(.*)`", README.read_text())
    with (
        Command() as exporter,
        subprocess.Popen([sys.executable, *shlex.split(held)]) as holder,
    ):
        try:
            eventually(lambda: f"\n{line}\n" in exporter.fetch("/metrics")[0])
        finally:
            holder.kill()


def test_a_restart_loses_at_most_one_scrape(tmp_path: Path) -> None:
    """Pre-existing connections count at once after a restart, so gaps of series are
    short."""
    # Intervals are usually 15 s or more; a restart must fit between two scrapes.
    interval_s = 3
    port = free_port()
    with Peers() as peers:
        peers.connect(7)
        with Command("--duration", "0", port=port) as before:
            with Prometheus(tmp_path, before.target, interval_s=interval_s) as prometheus:
                prometheus.wait_for(at(peers.port), {("4",): 7}, "tcp_version")
                assert before.stop()[0] == 0
                with Command("--duration", "0", port=port):
                    prometheus.wait_for("changes(process_start_time_seconds[10m])", {(): 1})
                    scraped = prometheus.samples(at(peers.port))
                    up = [value for _, value in prometheus.samples("up")]
    assert {value for _, value in scraped} == {7}
    gaps_s = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(scraped)]
    assert max(gaps_s) < 2.5 * interval_s
    assert up.count(0) <= 1


@pytest.mark.parametrize("version", ACCEPT)
def test_prometheus_requests_openmetrics(version: str) -> None:
    """The strict OpenMetrics parser accepts the exposition, which has the right value."""
    with Peers() as peers, Command("--duration", "0") as exporter:
        peers.connect(3)
        page, content_type = exporter.fetch("/metrics", Accept=ACCEPT[version])
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    parsed = parser.text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
    families = {each.name: each for each in parsed}
    assert families["tcpexporter_source"].type == "info"
    assert families["tcpexporter_kernel_events"].type == "counter"
    assert families[LONG_TERM].type == "gauge"
    counts = {each.labels["port"]: each.value for each in families[LONG_TERM].samples}
    assert counts[str(peers.port)] == 3
