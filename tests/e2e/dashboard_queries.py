# SPDX-License-Identifier: GPL-3.0-only
"""Reads the queries of a Grafana dashboard, and replaces Grafana's variables in them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

VARIABLES: Mapping[str, str] = {
    "$__rate_interval": "10s",
    "$job": ".+",
    "$instance": ".+",
    "$port": ".*",
    "$unit": ".*",
    "$top": "10",
}
"""The values that Grafana inserts, for a scrape interval of two seconds."""

LABEL_VALUES = re.compile(r"label_values\((.*), (\w+)\)")


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the panels of a dashboard without its rows."""
    return [each for each in dashboard["panels"] if each["type"] != "row"]


def expressions(dashboard: Mapping[str, Any]) -> Iterator[str]:
    """Yield the query of each target of each panel."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield target["expr"]


def variable_queries(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the selector and the label of each variable that is a list of values."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = LABEL_VALUES.fullmatch(variable["query"]["query"])
            assert found
            yield found[1], found[2]


def substituted(expression: str) -> str:
    """Return the query as Grafana sends it to Prometheus."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression
