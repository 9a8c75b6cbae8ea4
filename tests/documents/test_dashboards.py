# SPDX-License-Identifier: GPL-3.0-only
"""The Grafana dashboards are current and follow the rules of grafana/dashboard-linter.

tests/e2e/test_dashboards.py evaluates their queries.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy import dashboards, documents
from tests.e2e.dashboard_queries import expressions, panels, substituted, variable_queries

GAUGES = {"netstat_tcp_longterm_connections_total"}
"""Metrics of the Go program that have the name of a counter."""

UNITS = {"bytes", "ops", "percentunit", "s", "short"}
"""Units of Grafana that the dashboards use."""

WITHOUT_TARGET_LABELS = {"ALERTS"}

FILES = sorted(dashboards.FOLDER.glob("*.json"))


def loaded(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(path.read_text())
    return contents


def test_the_dashboards_are_up_to_date() -> None:
    """After a change of panels.py or dashboards.py, run `make dashboards`."""
    assert {path: path.read_text() for path in FILES} == dashboards.dashboards()


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_a_dashboard_has_the_schema_of_grafana(path: Path) -> None:
    """The models of Grafana's schema keep every field and value of the file."""
    decoded = Dashboard.from_json(loaded(path))
    encoded = json.loads(JSONEncoder(sort_keys=True, indent=2).encode(decoded))
    assert encoded == loaded(path)
    assert loaded(path)["schemaVersion"] >= 36


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_panels_have_titles_descriptions_and_units(path: Path) -> None:
    """Each panel has its own id, one of Grafana's units and the chosen data source."""
    found = panels(loaded(path))
    assert len({each["id"] for each in found}) == len(found)
    for panel in found:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_panels_fill_the_rows_of_the_grid(path: Path) -> None:
    """No panel overlaps another one, or exceeds the 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in loaded(path)["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_variables_choose_data_source_job_and_instance(path: Path) -> None:
    """Lists of values are read again when the time range changes, and allow all values."""
    source, *queried = loaded(path)["templating"]["list"]
    assert (source["name"], source["type"], source["label"]) == (
        *("datasource", "datasource"),
        "Data source",
    )
    assert source["query"] == "prometheus"
    queried = [each for each in queried if each["type"] == "query"]
    assert [each["name"] for each in queried][:2] == ["job", "instance"]
    for variable in queried:
        assert variable["label"] == variable["name"].capitalize()
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert variable["multi"]
        assert variable["includeAll"]
        # A series may lack the labels port and unit, and then .+ would exclude it.
        is_of_target = variable["name"] in ("job", "instance")
        assert variable["allValue"] == (".+" if is_of_target else ".*")
        assert variable["refresh"] == 2


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from _selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from _selectors(child)


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_queries_are_valid_and_restricted_to_the_chosen_targets(path: Path) -> None:
    """Every selector has matchers of job and instance, and names a published metric."""
    known = documents.metric_names() | {
        *("up", "ALERTS", "scrape_samples_scraped"),
        *("process_start_time_seconds", "process_cpu_seconds_total"),
        "process_resident_memory_bytes",
    }
    for expression in expressions(loaded(path)):
        found = list(_selectors(promql_parser.parse(substituted(expression))))
        assert found
        for selector in found:
            assert re.sub("_bucket$", "", selector.name or "") in known
            matchers = {each.name: str(each.value) for each in selector.matchers.matchers}
            assert matchers["job"] == matchers["instance"] == ".+"
        assert expression.count('job=~"$job", instance=~"$instance"') == len(found)
    for listed, label in variable_queries(loaded(path)):
        promql_parser.parse(substituted(listed))
        assert re.fullmatch("[a-z_]+", label)


@pytest.mark.parametrize("path", FILES, ids=lambda each: each.stem)
def test_counters_are_shown_as_rates(path: Path) -> None:
    """A rate covers $__rate_interval, which is long enough at every scrape interval."""
    for expression in expressions(loaded(path)):
        for metric, after in re.findall(
            r"(\w+_(?:total|bucket))\{[^}]*\}(\S*)", expression
        ):
            is_gauge = metric in GAUGES or metric.startswith("tcp_established_")
            assert after.startswith("[$__rate_interval])") != is_gauge
        assert set(re.findall(r"\[(.*?)\]", expression)) <= {"$__rate_interval"}


def test_the_alerts_link_to_the_dashboards() -> None:
    """The annotation dashboard has the address of one of the dashboards."""
    uids = {loaded(path)["uid"] for path in FILES}
    assert uids == {path.stem for path in FILES}
    linked = {
        uid
        for path in documents.RULES
        for uid in re.findall(r'dashboard: "/d/([\w-]+)', path.read_text())
    }
    assert linked == uids
