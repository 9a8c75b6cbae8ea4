# SPDX-License-Identifier: GPL-3.0-only
"""The queries of the Grafana dashboards, by dashboard, row and panel."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

OF_HOST = 'job=~"$job", instance=~"$instance"'
"""Matchers of every query."""

OF_SERIES = f'{OF_HOST}, port=~"$port", unit=~"$unit"'
"""Matchers of the metrics that have the labels of ``--labels``.

``.*`` stands for all values, so it also matches series without the label.
"""

BY = "instance, port, remote_port, unit"
"""The labels that a line is for. Series lack those that --labels does not choose."""

LEGEND = "{{instance}} {{port}}{{remote_port}} {{unit}}"

LONG_TERM = f"netstat_tcp_longterm_connections_total{{{OF_SERIES}}}"
ESTABLISHED = f"tcp_established_connections{{{OF_SERIES}}}"
CLIENTS = f"tcp_established_clients{{{OF_SERIES}}}"
LARGEST = f"tcp_largest_client_connections{{{OF_SERIES}}}"
RECENT = "[$__rate_interval]"


class Query(NamedTuple):
    """A query of a panel."""

    expr: str
    legend: str = "__auto"


class Panel(NamedTuple):
    """A panel of a dashboard."""

    kind: Literal["lines", "number", "rows", "buckets"]
    """A graph, the last value, a table, or a heatmap of histogram buckets."""
    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    """The unit of the values, one of Grafana's."""
    width: int = 12
    """Number of columns; a row has 24."""
    texts: Mapping[str, tuple[str, str]] = MappingProxyType({})
    """For a value, the text that is shown instead, and its color."""


def of_host(metric: str) -> str:
    """Return a selector of the metric for the chosen hosts."""
    return f"{metric}{{{OF_HOST}}}"


def top(expr: str) -> str:
    """Return the query for the series with the highest values."""
    return f"topk($top, sum by ({BY}) ({expr}))"


def rate(metric: str, matchers: str = OF_SERIES) -> str:
    """Return the rate of a counter, per second."""
    return f"rate({metric}{{{matchers}}}{RECENT})"


Rows = Mapping[str, Sequence[Panel]]
"""The panels of each row, by the row's title."""

CONNECTIONS: Rows = {
    "Now": [
        Panel(
            "number",
            "Established connections",
            "All connections of the chosen hosts, ports and units, of any age.",
            [Query(f"sum({ESTABLISHED})")],
            width=6,
        ),
        Panel(
            "number",
            "Long-term connections",
            "Connections established for at least --duration, 6 s by default.",
            [Query(f"sum({LONG_TERM})")],
            width=6,
        ),
        Panel(
            "number",
            "Clients",
            "Distinct clients, summed over the series. A client of two ports counts twice.",
            [Query(f"sum({CLIENTS})")],
            width=6,
        ),
        Panel(
            "number",
            "Expected connections",
            "Whether each rule of --expect has its minimum of long-term connections.",
            [
                Query(
                    f"{of_host('tcp_expected_longterm_connections')}"
                    f" >= bool on (job, instance, name) {of_host('tcp_expected_minimum')}",
                    "{{instance}} {{name}}",
                )
            ],
            width=6,
            texts={"0": ("missing", "red"), "1": ("present", "green")},
        ),
    ],
    "Connections": [
        Panel(
            "lines",
            "Established by port and owner",
            "The largest series. Outbound connections have the label remote_port.",
            [Query(top(ESTABLISHED), LEGEND)],
        ),
        Panel(
            "lines",
            "Long-term by port and owner",
            "Connections established for at least --duration: one for each user of a "
            "service that keeps a connection open.",
            [Query(top(LONG_TERM), LEGEND)],
        ),
        Panel(
            "rows",
            "Largest series",
            "The series with most connections, with their clients, the connections of the "
            "client that has most, and the connections opened per second.",
            [
                Query(top(ESTABLISHED), "established"),
                Query(f"sum by ({BY}) ({LONG_TERM})", "long-term"),
                Query(f"sum by ({BY}) ({CLIENTS})", "clients"),
                Query(f"max by ({BY}) ({LARGEST})", "largest client"),
                Query(
                    f"sum by ({BY}) ({rate('tcp_connections_opened_total')})",
                    "opened per second",
                ),
            ],
            width=24,
        ),
    ],
    "Users": [
        Panel(
            "lines",
            "Clients by port and owner",
            "Distinct IPv4 addresses and IPv6 networks (--client-prefix).",
            [Query(top(CLIENTS), LEGEND)],
        ),
        Panel(
            "lines",
            "Share of the largest client",
            "Near 100 % with many connections: clients come through a proxy, and users "
            "cannot be counted here.",
            [Query(f"topk($top, max by ({BY}) ({LARGEST} / ({ESTABLISHED} > 0)))", LEGEND)],
            unit="percentunit",
        ),
    ],
    "Opened and closed": [
        Panel(
            "lines",
            "Opened per second",
            "A peak while the number of connections stays the same: clients reconnect.",
            [Query(top(rate("tcp_connections_opened_total")), LEGEND)],
            unit="ops",
        ),
        Panel(
            "lines",
            "Closed per second",
            "A peak: the service, a proxy or the network ended connections.",
            [Query(top(rate("tcp_connections_closed_total")), LEGEND)],
            unit="ops",
        ),
        Panel(
            "lines",
            "Failed attempts per second",
            "Outbound attempts that ended before ESTABLISHED. Requires --direction "
            "outbound or all.",
            [Query(top(rate("tcp_connections_failed_total")), LEGEND)],
            unit="ops",
        ),
        Panel(
            "lines",
            "Reconnects: opened per hour and open connection",
            "How often an average connection is replaced. It rises when connections become "
            "short, whatever their number.",
            [
                Query(
                    f"topk($top, 3600 * sum by ({BY})"
                    f" ({rate('tcp_connections_opened_total')})"
                    f" / (sum by ({BY}) ({ESTABLISHED}) > 0))",
                    LEGEND,
                )
            ],
        ),
    ],
    "Ages and lifetimes (--histograms)": [
        Panel(
            "buckets",
            "Ages of open connections",
            "How long the open connections have been established. A step that moves up "
            "diagonally is a group of clients that connected at the same time.",
            [
                Query(
                    "sum by (le)"
                    f" (tcp_established_connection_age_seconds_bucket{{{OF_SERIES}}})",
                    "{{le}}",
                )
            ],
        ),
        Panel(
            "buckets",
            "Lifetimes of closed connections",
            "How long the connections lasted that closed in each interval.",
            [
                Query(
                    "sum by (le) (increase("
                    f"tcp_connection_duration_seconds_bucket{{{OF_SERIES}}}{RECENT}))",
                    "{{le}}",
                )
            ],
        ),
        Panel(
            "lines",
            "Median lifetime",
            "Half of the connections that closed lasted less. A value near 60 s often is "
            "the timeout of a proxy.",
            [
                Query(
                    f"topk($top, histogram_quantile(0.5, sum by ({BY}, le)"
                    f" ({rate('tcp_connection_duration_seconds_bucket')})))",
                    LEGEND,
                )
            ],
            unit="s",
            width=24,
        ),
    ],
    "Expected connections (--expect)": [
        Panel(
            "lines",
            "Connections that match a rule",
            "Long-term connections that match each rule of --expect, and the minimum.",
            [
                Query(
                    of_host("tcp_expected_longterm_connections"), "{{instance}} {{name}}"
                ),
                Query(of_host("tcp_expected_minimum"), "minimum of {{instance}} {{name}}"),
            ],
        ),
        Panel(
            "rows",
            "Alerts",
            "Pending and firing alerts of tcpexporter's rules.",
            [Query(f'ALERTS{{alertname=~"Tcp.+", {OF_HOST}}}', "active")],
        ),
    ],
}

EXPORTER: Rows = {
    "Now": [
        Panel(
            "number",
            "Exporters that respond",
            "Targets whose last scrape succeeded.",
            [Query(f"sum({of_host('up')})")],
            width=6,
        ),
        Panel(
            "number",
            "Uncertain connections",
            "Upper bound of the difference between the numbers and the kernel's, in network"
            " namespaces that existed at the start; 0: exact.",
            [Query(f"sum({of_host('tcpexporter_uncertain_connections')})")],
            width=6,
        ),
        Panel(
            "number",
            "Highest use of the connection slots",
            "Tracked connections divided by --max-connections, of the fullest exporter.",
            [
                Query(
                    f"max({of_host('tcpexporter_tracked_connections')}"
                    f" / {of_host('tcpexporter_max_connections')})"
                )
            ],
            unit="percentunit",
            width=6,
        ),
        Panel(
            "rows",
            "Versions and sources",
            "How many exporters run each version, and read connections from each source.",
            [
                Query(
                    f"count by (version, source) ({of_host('tcpexporter_build_info')}"
                    " * on (job, instance) group_left (source)"
                    f" {of_host('tcpexporter_source_info')})",
                    "exporters",
                )
            ],
            width=6,
        ),
    ],
    "Trust": [
        Panel(
            "lines",
            "Uncertain connections",
            "Above 0 for seconds is normal on a busy host; for half an hour it is not.",
            [Query(of_host("tcpexporter_uncertain_connections"), "{{instance}}")],
        ),
        Panel(
            "lines",
            "Missed events per second",
            "Socket state changes for which the kernel skipped the BPF program, because "
            "another one ran on that CPU.",
            [Query(rate("tcpexporter_missed_events_total", OF_HOST), "{{instance}}")],
            unit="ops",
        ),
        Panel(
            "lines",
            "Corrections per second",
            "Connections that reconciliation added or removed after a missed event.",
            [
                Query(
                    rate("tcpexporter_corrections_total", OF_HOST), "{{instance}} {{kind}}"
                )
            ],
            unit="ops",
        ),
        Panel(
            "lines",
            "Time since the last reconciliation",
            "It grows steadily if reconciliation fails: the log says why.",
            [
                Query(
                    "time() - ("
                    f"{of_host('tcpexporter_last_reconcile_timestamp_seconds')} > 0"
                    f" or {of_host('process_start_time_seconds')})",
                    "{{instance}}",
                )
            ],
            unit="s",
        ),
    ],
    "Capacity": [
        Panel(
            "lines",
            "Use of the connection slots",
            "At 100 % connections are refused, and the numbers are too low: raise "
            "--max-connections.",
            [
                Query(
                    f"{of_host('tcpexporter_tracked_connections')}"
                    f" / {of_host('tcpexporter_max_connections')}",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
        ),
        Panel(
            "lines",
            "Use of the series numbers",
            'At 100 % the connections of new series count as port="other".',
            [
                Query(
                    f"{of_host('tcpexporter_kernel_series')}"
                    f" / {of_host('tcpexporter_max_kernel_series')}",
                    "{{instance}}",
                )
            ],
            unit="percentunit",
        ),
        Panel(
            "lines",
            "Folded series",
            'Series that are summed up as port="other": raise --max-series, or name the '
            "important ports with --port.",
            [Query(of_host("tcpexporter_folded_series"), "{{instance}}")],
        ),
        Panel(
            "lines",
            "Connections inserted, removed and refused per second",
            "What the BPF program did with the events. Refused ones are not counted.",
            [
                Query(
                    rate("tcpexporter_kernel_events_total", OF_HOST),
                    "{{instance}} {{action}}",
                )
            ],
            unit="ops",
        ),
    ],
    "Cost": [
        Panel(
            "lines",
            "CPU",
            "Cores used by the exporter. The BPF program's time is not included.",
            [Query(rate("process_cpu_seconds_total", OF_HOST), "{{instance}}")],
            unit="percentunit",
        ),
        Panel(
            "lines",
            "Resident memory",
            "The exporter's memory without the BPF maps.",
            [Query(of_host("process_resident_memory_bytes"), "{{instance}}")],
            unit="bytes",
        ),
        Panel(
            "lines",
            "Time to collect",
            "Time needed to read and count the connections for a scrape.",
            [Query(of_host("tcpexporter_collect_duration_seconds"), "{{instance}}")],
            unit="s",
        ),
        Panel(
            "lines",
            "Samples of a scrape",
            "What each exporter costs Prometheus. --max-series limits it.",
            [Query(of_host("scrape_samples_scraped"), "{{instance}}")],
        ),
    ],
    "Process": [
        Panel(
            "lines",
            "Failures of background tasks per second",
            "Runs that failed or exceeded their time limit: the log names the reason.",
            [
                Query(
                    rate("tcpexporter_background_failures_total", OF_HOST),
                    "{{instance}} {{task}}",
                )
            ],
            unit="ops",
        ),
        Panel(
            "lines",
            "Missing confinements",
            "Mechanisms that do not confine the serving process: no_capabilities is among "
            "them before Linux 5.19.",
            [
                Query(
                    f"count by (instance) ({of_host('tcpexporter_confined')})"
                    f" - sum by (instance) ({of_host('tcpexporter_confined')})",
                    "{{instance}}",
                )
            ],
        ),
    ],
}
