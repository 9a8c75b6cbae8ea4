# SPDX-License-Identifier: GPL-3.0-only
"""Runs the queries in docs/owners.md with promtool."""

import re
from pathlib import Path

import yaml

from tests.e2e.test_rules import promtool

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/owners.md"
CASES = ROOT / "tests/e2e/recipes_test.yml"


def recipes() -> dict[str, str]:
    """Return each query of the page, by the heading above it."""
    found = re.findall(
        r"(?ms)^### ([^\n]+)$(?:(?!^#).)*?^```promql\n(.*?)^```$", PAGE.read_text()
    )
    return dict(found)


def test_each_recipe_gives_the_expected_samples(tmp_path: Path) -> None:
    """``promtool test rules`` evaluates the text of the page for the input series."""
    queries = recipes()
    cases = yaml.safe_load(CASES.read_text())
    used = set()
    for test in cases["tests"]:
        for case in test["promql_expr_test"]:
            used.add(case["expr"])
            case["expr"] = queries[case["expr"]]
    assert used == queries.keys()
    assert len(queries) == PAGE.read_text().count("```promql")
    file = tmp_path / "recipes_test.yml"
    file.write_text(yaml.safe_dump(cases))
    assert "SUCCESS" in promtool("test", "rules", file)


def test_the_cases_have_the_labels_of_the_page() -> None:
    """A label that the exporter does not publish would make a case meaningless."""
    labels = {"netstat_tcp_longterm_connections_total": {"port", "tcp_version"}}
    labels["tcpexporter_owner_info"] = {"cgroup"}
    own = re.findall(r"((?:netstat_tcp|tcpexporter)_\w+)\{(.*)\}'", CASES.read_text())
    for name, matchers in own:
        given = set(re.findall(r"(\w+)=", matchers)) - {"job", "host"}
        assert labels[name] <= given <= labels[name] | {"unit", "container", "pod"}
