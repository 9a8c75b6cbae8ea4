# SPDX-License-Identifier: GPL-3.0-only
"""Writes the documents that are generated from the code: ``make documents``.

They are the tables in docs/settings.md and docs/metrics.md, the alerts in docs/alerts.md,
the map of the tree in CONTRIBUTING.md, the man page deploy/man/tcpexporter.8, the
environment file in deploy/systemd, the files in deploy/completion, and the alert rules for
Kubernetes.
"""

import ast
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from deploy import shells
from tcpexporter.config import settings
from tcpexporter.config.rules import parse_rules
from tcpexporter.config.values import LABELS
from tcpexporter.connections.parts import Direction, kernel_parts
from tcpexporter.connections.record import LISTENER
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import MemorySource, Reconciliation, Report
from tcpexporter.host.background import Task
from tcpexporter.metrics.collector import (
    Choice,
    ConnectionCollector,
    make_serving_registry,
)
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.metrics.reload_status import Reloads
from tests import tables

ROOT = Path(__file__).parents[1]

SETTINGS_BEGIN = "<!-- settings: written by make documents -->"
SETTINGS_END = "<!-- end of settings -->"
METRICS_BEGIN = "<!-- metrics: written by make documents -->"
METRICS_END = "<!-- end of metrics -->"
ALERTS_BEGIN = "<!-- alerts: written by make documents -->"
ALERTS_END = "<!-- end of alerts -->"
TREE_BEGIN = "<!-- tree: written by make documents -->"
TREE_END = "<!-- end of tree -->"

RULES = [
    ROOT / "deploy" / "prometheus" / f"{name}.rules.yml"
    for name in ("tcpexporter", "examples")
]
"""The files of alert rules, in the order of docs/alerts.md."""

RUNBOOK = ROOT / "deploy" / "runbook.yml"
"""What to do about each alert. It is not in deploy/prometheus, because it has no rules."""

TITLES = {
    "tcpexporter": "Alerts about the exporter",
    "tcpexporter-connections": "Alerts about connections",
    "tcpexporter-examples": "Examples of alerts on your services",
}
"""The headings of the groups of alert rules."""

BOUNDS_S = (1.0,)
"""Bounds of the histograms. The table does not show buckets, so the value is arbitrary."""

OF_EVERY_PROCESS = ("process_", "python_info")
"""Beginnings of the names of metrics that prometheus_client adds.

The table leaves out these metrics, because the text of docs/metrics.md names them.
"""


class Described(NamedTuple):
    """A setting and its description in ``--help``."""

    name: str
    flags: Sequence[str]
    variables: Sequence[str]
    metavar: str
    default: str
    allowed: str
    help: str


def described() -> Iterator[tuple[str, Sequence[Described]]]:
    """Yield each group of ``--help``: its title and its settings."""
    for title, group in settings.GROUPS.items():
        yield (
            title,
            [
                Described(
                    each.name,
                    each.flags,
                    each.variables,
                    each.kind.metavar,
                    each.default,
                    each.kind.allowed,
                    each.help,
                )
                for each in group
            ],
        )


# --- docs/settings.md ---


def settings_tables() -> str:
    """Return a heading and a table for each group of settings."""
    return "\n\n".join(
        f"### {title[:1].upper()}{title[1:]}\n\n{tables.markdown(_settings_table(group))}"
        for title, group in described()
    )


def _settings_table(group: Sequence[Described]) -> tables.Table:
    return [
        ["flag", "environment variable", "default", "meaning", "value"],
        *(
            [
                ", ".join(map(_code, each.flags)),
                ", ".join(map(_code, each.variables)),
                _code(each.default) if each.default else "",
                _cell(each.help),
                _cell(each.allowed),
            ]
            for each in group
        ),
    ]


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


# --- docs/metrics.md ---


def metrics_table() -> str:
    """Return a table of every metric that ``/metrics`` can have."""
    rows = [
        [_code(_name(each)), _type(each), _labels(each), _help(each)]
        for each in registry().collect()
        if not each.name.startswith(OF_EVERY_PROCESS)
    ]
    return tables.markdown([["metric", "type", "labels", "meaning"], *rows])


def metric_names() -> set[str]:
    """Return the names of all metrics and of their samples."""
    families = list(registry().collect())
    samples = {sample.name for family in families for sample in family.samples}
    return samples | {_name(family) for family in families}


def registry() -> CollectorRegistry:
    """Return a registry with every metric: its source reports every value."""
    directions = tuple(Direction)
    source = MemorySource(
        listeners=np.array([(0, 443, 4, 1)], LISTENER),
        report=Report(
            max_connections=1,
            kernel_events={"inserted": 0, "removed": 0, "refused": 0},
            missed_events=0,
            uncertain_connections=0,
            kernel_series=0,
            max_kernel_series=1,
            seeded_connections=0,
            refused_seeds=0,
            reconciliation=Reconciliation(),
            state_saved_s=0,
        ),
        parts=kernel_parts(directions, LABELS),
        bounds_s=BOUNDS_S,
    )
    owners = OwnerNumbers(LABELS, paths=None)
    selection = select(
        (),
        tcpv6=True,
        directions=directions,
        labels=LABELS,
        owners=owners,
    )
    rules = parse_rules("db=remote=192.0.2.10:5432")
    choice = Choice(selection, named((443,), 0, selection), duration_s=0, rules=rules)
    collector = ConnectionCollector(
        *(source, choice),
        max_series=1,
        owners=owners,
        bounds_s=BOUNDS_S,
        has_clients=True,
    )
    task = Task("poll", lambda: None, without="", limit_s=1)
    found = make_serving_registry(
        collector, Reloads(), tasks=lambda: [task], dropped=lambda: 0
    )
    found.register(ConfinementCollector({"seccomp": True}))
    return found


def _name(family: Metric) -> str:
    is_histogram = family.type in ("histogram", "gaugehistogram")
    return family.name if is_histogram else family.samples[0].name


def _type(family: Metric) -> str:
    return "gauge histogram" if family.type == "gaugehistogram" else family.type


def _labels(family: Metric) -> str:
    labels = [each for each in family.samples[0].labels if each != "le"]
    if labels == list(LABELS):
        return "those of `--labels`"
    return ", ".join(map(_code, labels))


def _help(family: Metric) -> str:
    return _cell(family.documentation)


# --- CONTRIBUTING.md ---


def tree_table() -> str:
    """Return a table of every module with a docstring: its path and its first line."""
    package = ROOT / "tcpexporter"
    rows = [
        [_code(str(path.relative_to(ROOT))), _cell(summary)]
        for path in sorted(package.rglob("*.py"), key=lambda each: (each.parent, each))
        if (summary := _summary(path))
    ]
    return tables.markdown([["module", "purpose"], *rows])


def _summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring; empty if there is none."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


# --- The man page ---


def man_page() -> str:
    """Return the man page, in the macros of man(7)."""
    template = (ROOT / "deploy" / "man" / "template.8").read_text()
    options = "\n".join(line for each in described() for line in _man_group(*each))
    variables = ", ".join(
        variable
        for _, group in described()
        for each in group
        for variable in each.variables
        if not variable.startswith("TCPEXPORTER_")
    )
    return template.replace("@OPTIONS@", options).replace("@UNPREFIXED@", variables)


def _man_group(title: str, group: Sequence[Described]) -> Iterator[str]:
    yield f".SS {_roff(title[:1].upper() + title[1:])}"
    for each in group:
        value = (
            rf"[=\fI{_roff(each.metavar.strip('[=]'))}\fR]"
            if each.metavar.startswith("[=")
            else rf"=\fI{_roff(each.metavar)}\fR"
        )
        yield ".TP"
        yield ", ".join(rf"\fB{_roff(flag)}\fR{value}" for flag in each.flags)
        yield _roff(f"{each.help[:1].upper()}{each.help[1:]}.")
        yield _roff(f"Value: {each.allowed}. Default: {each.default or 'none'}.")


def _roff(text: str) -> str:
    """Return the text for roff: hyphens stay hyphens, and no line is a roff request."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", escaped)


# --- docs/alerts.md ---


def alerts_text() -> str:
    """Return the text on each alert, by group; runbook_url leads to the alert's heading."""
    runbook = yaml.safe_load(RUNBOOK.read_text())
    groups = [
        group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]
    ]
    return "".join(_alert_group(group, runbook) for group in groups)


def _alert_group(group: dict[str, Any], runbook: dict[str, dict[str, str]]) -> str:
    rules = [rule for rule in group["rules"] if "alert" in rule]
    return f"## {TITLES[group['name']]}\n\n" + "".join(
        _alert(rule, **runbook[rule["alert"]]) for rule in rules
    )


def _alert(
    rule: dict[str, Any], *, means: str, check: str, remedy: str, silence: str
) -> str:
    return (
        f"### {rule['alert']}\n\n"
        f"Severity {rule['labels']['severity']}, after {rule['for']}. {means}\n\n"
        f"- **Check first**: {check}\n"
        f"- **What to do**: {remedy}\n"
        f"- **When to silence**: {silence}\n\n"
        f"```promql\n{rule['expr'].strip()}\n```\n\n"
    )


# --- /etc/default/tcpexporter ---

DEFAULTS = """\
# SPDX-License-Identifier: GPL-3.0-only
# Settings of the service tcpexporter. Written by `make documents`.
#
# To change a setting, remove the # before it. The line shows the default. Then run:
#
#     systemctl restart tcpexporter
#
# A reload does not read this file: it reads the file of TCPEXPORTER_CONF.
#
# The service itself sets TCPEXPORTER_PIN and TCPEXPORTER_STATE: an empty value here turns
# one off. tcpexporter(8) describes all settings.
"""

NOT_OF_A_SERVICE = frozenset({"once", "output", "unpin", "features", "check"})
"""Settings that the environment file leaves out.

Each makes the exporter do one thing and exit, or belongs to such a setting. systemd would
report a service with one of them as failed.
"""


def defaults_file() -> str:
    """Return a file for EnvironmentFile= with every setting of a service commented out."""
    return DEFAULTS + "".join(
        f"\n# --- {title} ---\n{''.join(map(_commented_out, group))}"
        for title, all_in_group in described()
        if (group := [each for each in all_in_group if each.name not in NOT_OF_A_SERVICE])
    )


def _commented_out(each: Described) -> str:
    lines = textwrap.wrap(
        f"{each.help[:1].upper()}{each.help[1:]}. Value: {each.allowed}.",
        92,
        initial_indent="# ",
        subsequent_indent="# ",
        break_on_hyphens=False,
    )
    return "\n".join(["", *lines, f"#{each.variables[0]}={each.default}", ""])


# --- deploy/kubernetes ---


def prometheus_rule() -> str:
    """Return the alert rules as an object of the Prometheus Operator."""
    rules = (ROOT / "deploy" / "prometheus" / "tcpexporter.rules.yml").read_text()
    _, groups = rules.split("\ngroups:\n")
    header = """\
# SPDX-License-Identifier: GPL-3.0-only
# Written by `make documents` from deploy/prometheus/tcpexporter.rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: tcpexporter
  labels:
    app.kubernetes.io/name: tcpexporter
spec:
  groups:
"""
    return header + textwrap.indent(groups, "  ")


# --- All of them ---


def _with_settings(text: str) -> str:
    return tables.replaced(text, SETTINGS_BEGIN, SETTINGS_END, settings_tables())


def _with_metrics(text: str) -> str:
    return tables.replaced(text, METRICS_BEGIN, METRICS_END, metrics_table())


def _with_alerts(text: str) -> str:
    return tables.replaced(text, ALERTS_BEGIN, ALERTS_END, alerts_text())


def _with_tree(text: str) -> str:
    return tables.replaced(text, TREE_BEGIN, TREE_END, tree_table())


DOCUMENTS: dict[Path, Callable[[str], str]] = {
    ROOT / "docs" / "settings.md": _with_settings,
    ROOT / "docs" / "metrics.md": _with_metrics,
    ROOT / "docs" / "alerts.md": _with_alerts,
    ROOT / "CONTRIBUTING.md": _with_tree,
    ROOT / "deploy" / "man" / "tcpexporter.8": lambda _: man_page(),
    ROOT / "deploy" / "systemd" / "tcpexporter.default": lambda _: defaults_file(),
    ROOT / "deploy" / "completion" / "tcpexporter.bash": lambda _: shells.bash(),
    ROOT / "deploy" / "completion" / "tcpexporter.zsh": lambda _: shells.zsh(),
    ROOT / "deploy" / "completion" / "tcpexporter.fish": lambda _: shells.fish(),
    ROOT / "deploy" / "kubernetes" / "monitoring" / "prometheus-rule.yaml": (
        lambda _: prometheus_rule()
    ),
}
"""For each document, the function that makes its new text from its old text."""


def main() -> None:
    """Write each generated document again."""
    for path, new in DOCUMENTS.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(new(path.read_text() if path.exists() else ""))


if __name__ == "__main__":
    main()
