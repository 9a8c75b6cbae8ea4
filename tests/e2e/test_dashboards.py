# SPDX-License-Identifier: GPL-3.0-only
"""A real Prometheus evaluates every query of the dashboards over data under load."""

import json
import math
import time
from pathlib import Path

import yaml

from deploy import dashboards
from tests.e2e.dashboard_load import scraped_under_load
from tests.e2e.dashboard_queries import panels, substituted, variable_queries
from tests.e2e.test_rules import RECORDING

LOADED_S = 19
"""Rates require two scrapes, and Prometheus delays the first one by five seconds."""


def test_every_panel_variable_and_recording_rule_has_data(tmp_path: Path) -> None:
    """No result is empty or has only NaN."""
    (rules,) = yaml.safe_load(RECORDING.read_text())["groups"]
    queries = {each["record"]: each["expr"] for each in rules["rules"]}
    for path in dashboards.FOLDER.glob("*.json"):
        dashboard = json.loads(path.read_text())
        for panel in panels(dashboard):
            for target in panel["targets"]:
                queries[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
        for selector, label in variable_queries(dashboard):
            matchers = ", ".join(
                filter(None, [selector[:-1].split("{")[1], f'{label}!=""'])
            )
            name = selector.split("{")[0]
            queries[f"{path.stem}: ${label}"] = f"group by ({label}) ({name}{{{matchers}}})"
    empty = []
    with scraped_under_load(tmp_path, LOADED_S) as prometheus:
        now_s = time.time()
        for title, expression in queries.items():
            found = prometheus.query_range(substituted(expression), now_s - 7, now_s, 1)
            values = [value for points in found.values() for _, value in points]
            if all(math.isnan(value) for value in values):
                empty.append(title)
    assert empty == []
