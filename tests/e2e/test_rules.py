# SPDX-License-Identifier: GPL-3.0-only
"""Checks the alert rules in deploy/prometheus with promtool and against the collector."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client.samples import Sample

from deploy import documents
from tcpexporter.collecting import SOURCES
from tcpexporter.config.rules import parse_rules
from tcpexporter.connections.parts import Direction, client_masks, has_owner, kernel_parts
from tcpexporter.connections.record import LISTENER, SOCKET
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import MemorySource, Reconciliation, Report
from tcpexporter.ebpf.source import PUBLISHED_EVENTS
from tcpexporter.host.background import Task
from tcpexporter.metrics.collector import (
    Choice,
    ConnectionCollector,
    make_serving_registry,
)
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.metrics.reload_status import Reloads
from tests.unit.made_cgroups import MadePaths

ROOT = Path(__file__).parents[2]
RULES = [*documents.RULES]
"""The files of alert rules."""

RECORDING = ROOT / "deploy/prometheus/recording.rules.yml"
RECORDING_CASES = ROOT / "tests/e2e/recording_test.yml"
CASES = ROOT / "tests/e2e/rules_test.yml"
ALERTS = ROOT / "docs/alerts.md"
FLEET = ROOT / "docs/fleet.md"

PORTS = (443, 3838, 5432)
"""Ports in the examples."""

EXPECTED = parse_rules("db=remote=192.0.2.10:5432 pool=remote=192.0.2.11:5432,min=2")

CGROUP = 7
"""The cgroup of the listeners."""

MECHANISMS = ("seccomp", "landlock", "unprivileged_user", "no_capabilities")
"""Label values of tcpexporter_confined, as in tests/kernel/test_confinement.py."""

LABELS = (
    ("port", "tcp_version"),
    ("port", "tcp_version", "direction"),
    ("port", "tcp_version", "remote_port"),
    ("port", "unit"),
)
"""Values of --labels: the default one, and those with failed attempts in the cases."""

BOUNDS_S = (60.0, 600.0, 3600.0, 21600.0)
"""Bounds of the buckets in the cases."""

TASKS = [
    Task(name, lambda: None, without="", limit_s=1)
    for name in ("poll", "reconcile", "state", "reload")
]

OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to those of the exposition."""

OF_OPERATORS = {"polling"}
"""Labels that an operator can give to targets, and that the rules know."""

WITHOUT_ALERT = {
    "tcpexporter_seeded_connections",  # All connections are pre-existing after a restart.
    "tcpexporter_build_info",  # This is information only.
    "tcpexporter_duration_seconds",  # This is a setting.
    # This is no fault: it is the number of connections when counting began.
    "tcpexporter_pre_existing_connections",
    "tcpexporter_owner_info",  # This is information only.
    # If collecting takes longer than a scrape may, TcpexporterDown fires.
    "tcpexporter_collect_duration_seconds",
    # The metric _successful has an alert.
    "tcpexporter_config_last_reload_success_timestamp_seconds",
}
"""Metrics of the exporter itself without an alert."""

GROUPING = re.compile(r"\b(?:by|without|on)\s*\([^)]*\)")
SELECTOR = re.compile(r"\b(up|[a-z]+(?:_[a-z]+)+)\b(?!\s*\()\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*!?=~?\s*"([^"]*)"')


def promtool(*arguments: str | Path) -> str:
    """Run promtool and return its output; the test fails if its exit code is not 0."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not on PATH: Debian has it in the package prometheus")
    done = subprocess.run(
        [path, *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def alerts() -> dict[str, str]:
    """Return the text of each rule, by alert name."""
    parts = [part for path in RULES for part in path.read_text().split("- alert: ")[1:]]
    return {part.splitlines()[0]: part for part in parts}


def selectors(rule: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the metrics in a rule's expression, each with its label matchers."""
    (expression,) = re.findall(r"(?s)\n +expr: (.*?)\n +for: ", rule)
    found = SELECTOR.findall(GROUPING.sub("", expression))
    return [(name, MATCHER.findall(matchers)) for name, matchers in found]


def samples() -> Iterator[Sample]:
    """Yield each sample that an exporter can publish, for some choices of --labels."""
    # Port 80 is not named, so its series is folded.
    listeners = np.array([(0, port, 4, CGROUP) for port in (*PORTS, 80)], LISTENER)
    outbound = np.zeros(1, SOCKET)
    outbound["is_outbound"] = Direction.OUTBOUND
    outbound["key"]["remote_port"] = 80
    report = Report(
        max_connections=100,
        kernel_events=dict.fromkeys(PUBLISHED_EVENTS, 0),
        missed_events=0,
        uncertain_connections=0,
        kernel_series=0,
        max_kernel_series=1,
        seeded_connections=0,
        refused_seeds=0,
        reconciliation=Reconciliation(),
        state_saved_s=0,
    )
    for name, labels in itertools.product(SOURCES, LABELS):
        source = MemorySource(
            [outbound],
            listeners=listeners,
            report=report,
            name=name,
            parts=kernel_parts((*Direction,), labels, client_masks=client_masks(32, 64)),
            bounds_s=BOUNDS_S,
        )
        owners = OwnerNumbers(labels, MadePaths({CGROUP: "/system.slice/nginx.service"}))
        selection = select(
            (), tcpv6=True, directions=(*Direction,), labels=labels, owners=owners
        )
        choice = Choice(selection, named(PORTS, 0, selection), 6, EXPECTED)
        collector = ConnectionCollector(
            *(source, choice),
            max_series=2,
            owners=owners if has_owner(labels) else None,
            bounds_s=BOUNDS_S,
            has_clients=True,
        )
        registry = make_serving_registry(
            collector, Reloads(), tasks=lambda: TASKS, dropped=int
        )
        registry.register(ConfinementCollector(dict.fromkeys(MECHANISMS, True)))
        for family in registry.collect():
            yield from family.samples


def published() -> dict[str, dict[str, set[str]]]:
    """Return each metric that an exporter can publish, with its labels and their values."""
    metrics: dict[str, dict[str, set[str]]] = {}
    for sample in samples():
        values = metrics.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            values.setdefault(label, set()).add(value)
    return metrics


def test_promtool_accepts_the_rules() -> None:
    """``promtool check rules`` with its linter accepts each file."""
    paths = sorted(ROOT.glob("deploy/prometheus/*.rules.yml"))
    assert paths == sorted([*RULES, RECORDING])
    assert promtool("check", "rules", "--lint-fatal", *paths).count("SUCCESS") == len(paths)


@pytest.mark.parametrize("at", range(3))
def test_promtool_accepts_the_configurations_in_fleet_md(at: int, tmp_path: Path) -> None:
    """``promtool check config`` accepts each YAML block of the document."""
    blocks = re.findall("(?ms)^```yaml\n(.*?)^```$", FLEET.read_text())
    assert len(blocks) == 3
    config = tmp_path / "prometheus.yml"
    config.write_text(blocks[at])
    assert "is valid" in promtool("check", "config", config)


def test_recording_rules_have_the_sums_of_the_cases() -> None:
    """Each rule has a case, and reads published metrics."""
    assert "SUCCESS" in promtool("test", "rules", RECORDING_CASES)
    (group,) = yaml.safe_load(RECORDING.read_text())["groups"]
    (cases,) = yaml.safe_load(RECORDING_CASES.read_text())["tests"]
    tested = [each["expr"].partition("{")[0] for each in cases["promql_expr_test"]]
    assert [rule["record"] for rule in group["rules"]] == tested
    for rule in group["rules"]:
        read = SELECTOR.findall(GROUPING.sub("", rule["expr"]))
        assert {name for name, _ in read} <= published().keys()


def test_alerts_fire_in_the_cases_that_expect_them() -> None:
    """``promtool test rules`` checks when each alert fires, and its annotations."""
    assert "SUCCESS" in promtool("test", "rules", CASES)


def test_each_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    """promtool ignores alerts without cases, and wrong names in cases."""
    assert all(path.name in CASES.read_text() for path in RULES)
    cases = re.findall(r"alertname: (\S+)\n +exp_alerts:(.*)", CASES.read_text())
    assert len(cases) == CASES.read_text().count("eval_time:")
    assert {name for name, expected in cases if expected == " []"} == alerts().keys()
    assert {name for name, expected in cases if expected != " []"} == alerts().keys()


@pytest.mark.parametrize("name", alerts())
def test_each_alert_has_a_delay_a_severity_and_a_description(name: str) -> None:
    """Each alert has "for", a severity, a summary, a description and links.

    runbook_url leads to the heading of the alert in docs/alerts.md.
    """
    rule = alerts()[name]
    assert re.search(r"\n +for: [1-9]\d*m\n", rule)
    assert re.search(r"\n +severity: (critical|warning)\n", rule)
    assert re.search(r'\n +summary: ".+"\n', rule)
    assert re.search(r"\n +description: >-\n +\S+ ", rule)
    assert re.search(r'\n +dashboard: "/d/tcpexporter-(connections|exporter)\b', rule)
    (link,) = re.findall(r'\n +runbook_url: "(.*)"\n', rule)
    assert link == f"https://tcpexporter.example/docs/alerts.md#{name.lower()}"
    assert f"\n### {name}\n" in ALERTS.read_text()


@pytest.mark.parametrize("name", alerts())
def test_each_alert_uses_published_metrics(name: str) -> None:
    """The collector publishes every metric, label and value in the expression."""
    metrics = published()
    used = selectors(alerts()[name])
    assert used
    for metric, matchers in used:
        assert metric in {"up", *metrics}
        for label, value in matchers:
            values = metrics.get(metric, {}).get(label, set())
            # "" in a matcher means that the series does not have the label.
            assert label in OF_PROMETHEUS | OF_OPERATORS or (
                values and value in {"", *values}
            )


def test_the_cases_have_published_series() -> None:
    """Every series in the cases has the name and labels of a published one."""
    metrics = {(each.name, frozenset(each.labels)) for each in samples()}
    series = re.findall(r"- series: '(\w+)\{(.*)\}'", CASES.read_text())
    assert len(series) == CASES.read_text().count("series: ")
    for metric, matchers in series:
        labels = {label for label, _ in MATCHER.findall(matchers)}
        own = frozenset(labels - OF_PROMETHEUS - OF_OPERATORS)
        assert labels >= OF_PROMETHEUS
        assert (metric, own) in {("up", frozenset()), *metrics}


def test_every_metric_about_the_exporter_has_an_alert() -> None:
    """A new metric requires an alert, or an entry in WITHOUT_ALERT."""
    own = {name for name in published() if name.startswith("tcpexporter_")}
    watched = {metric for rule in alerts().values() for metric, _ in selectors(rule)}
    assert own - watched == WITHOUT_ALERT


def test_the_rules_use_the_job_name_of_the_readme() -> None:
    """With another job name TcpexporterDown would never fire."""
    (name,) = re.findall(r"job_name: (\S+)", (ROOT / "README.md").read_text())
    jobs = {job for rule in alerts().values() for job in re.findall('job="(.*?)"', rule)}
    assert jobs == {name}
