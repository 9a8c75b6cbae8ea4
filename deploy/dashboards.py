# SPDX-License-Identifier: GPL-3.0-only
"""Writes the Grafana dashboards in deploy/grafana: ``make dashboards``.

There are two: *Connections* has the numbers of the hosts' services, and *Exporter* shows
whether these numbers can be trusted, and what they cost. Their queries are in panels.py.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.panels import CONNECTIONS, EXPORTER, Panel, Query, Rows

FOLDER = Path(__file__).parent / "grafana"

DATA_SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")


# --- The kinds of panels ---


def _lines(_: Panel) -> Any:
    """Return a graph over time."""
    legend = (
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.TABLE)
        .placement(common.LegendPlacement.BOTTOM)
        .calcs(["lastNotNull", "max"])
        .show_legend(True)
    )
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    return timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(10).min(0)


def _number(panel: Panel) -> Any:
    """Return the last value, with the earlier ones as a line below it."""
    last = common_builders.ReduceDataOptions().calcs(["lastNotNull"])
    built = stat.Panel().reduce_options(last).graph_mode(common.BigValueGraphMode.AREA)
    if not panel.texts:
        return built
    results = {
        value: dashboard.ValueMappingResult(text=text, color=color)
        for value, (text, color) in panel.texts.items()
    }
    return built.mappings([dashboard.ValueMap(options=results)])


def _rows(panel: Panel) -> Any:
    """Return a table with a row for each series, and the queries as its columns."""
    merge = dashboard.DataTransformerConfig(id_val="merge", options={})
    hide = dashboard.DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": {"Time": True},
            "renameByName": {
                f"Value #{chr(ord('A') + at)}": query.legend
                for at, query in enumerate(panel.queries)
            },
        },
    )
    return table.Panel().filterable(True).transformations([merge, hide])


def _buckets(_: Panel) -> Any:
    """Return a heatmap of a histogram's buckets over time."""
    color = (
        heatmap.HeatmapColorOptions()
        .mode(heatmap_models.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .steps(64)
    )
    return heatmap.Panel().color(color).y_axis(heatmap.YAxisConfig().unit("s"))


KINDS: Mapping[str, Callable[[Panel], Any]] = {
    "lines": _lines,
    "number": _number,
    "rows": _rows,
    "buckets": _buckets,
}

FORMATS = {"rows": PromQueryFormat.TABLE, "buckets": PromQueryFormat.HEATMAP}
"""How a kind of panel receives its data; the others receive time series."""


# --- Dashboards ---


def variables(labels: Sequence[str]) -> Iterator[Any]:
    """Yield the variables: data source, job, instance, these labels, and the top N."""
    yield builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    metric = "tcp_established_connections" if labels else "tcpexporter_build_info"
    matchers = ""
    for name, all_value in (
        ("job", ".+"),
        ("instance", ".+"),
        *((label, ".*") for label in labels),
    ):
        query = f"label_values({metric}{{{matchers}}}, {name})"
        yield (
            builders.QueryVariable(name)
            .label(name.capitalize())
            .datasource(DATA_SOURCE)
            .query({"query": query, "refId": name})
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.NUMERICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(all_value)
            .current(dashboard.VariableOption(text="All", value="$__all"))
        )
        matchers += f'{", " if matchers else ""}{name}=~"${name}"'
    if labels:
        yield builders.CustomVariable("top").label("Top").values("10,20,50,100")


def make(
    title: str,
    description: str,
    contents: Rows,
    *,
    labels: Sequence[str] = (),
) -> dashboard.Dashboard:
    """Return a dashboard with these panels, and with variables for these labels."""
    built = (
        builders.Dashboard(f"tcpexporter: {title}")
        .uid(f"tcpexporter-{title.lower()}")
        .description(description)
        .tags(["tcpexporter"])
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("1m")
        .link(
            builders.DashboardLink("tcpexporter")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["tcpexporter"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .link(
            builders.DashboardLink("What do the alerts mean?")
            .type(dashboard.DashboardLinkType.LINK)
            .url("https://tcpexporter.example/docs/alerts.md")
            .target_blank(True)
        )
    )
    for variable in variables(labels):
        built = built.with_variable(variable)
    ids = itertools.count(1)
    for row, panels in contents.items():
        built = built.with_row(builders.Row(row).id(next(ids)))
        for panel in panels:
            built = built.with_panel(_panel(panel).id(next(ids)))
    return built.build()


def _panel(panel: Panel) -> Any:
    built = (
        KINDS[panel.kind](panel)
        .title(panel.title)
        .description(panel.description)
        .datasource(DATA_SOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(5 if panel.width < 12 else 9)
    )
    for at, query in enumerate(panel.queries):
        built = built.with_target(_target(panel, query, chr(ord("A") + at)))
    return built


def _target(panel: Panel, query: Query, ref_id: str) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .expr(query.expr)
        .legend_format(query.legend)
        .ref_id(ref_id)
        .datasource(DATA_SOURCE)
        .format(FORMATS.get(panel.kind, PromQueryFormat.TIME_SERIES))
    )
    return target.instant() if panel.kind == "rows" else target.range()


def dashboards() -> dict[Path, str]:
    """Return the JSON of each dashboard, by its file."""
    made = [
        make(
            "Connections",
            "Established and long-term TCP connections, their clients, owners and ages.",
            CONNECTIONS,
            labels=("port", "unit"),
        ),
        make(
            "Exporter",
            "Whether the numbers of tcpexporter are exact, and what they cost.",
            EXPORTER,
        ),
    ]
    return {
        FOLDER / f"{each.uid}.json": JSONEncoder(sort_keys=True, indent=2).encode(each)
        + "\n"
        for each in made
    }


def main() -> None:
    """Write each dashboard."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in dashboards().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
