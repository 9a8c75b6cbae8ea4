# SPDX-License-Identifier: GPL-3.0-only
"""Metric families of the state of a source: its capacity, events and corrections."""

from collections.abc import Iterator

from prometheus_client import Metric

from tcpexporter.connections.source import Reconciliation, Report
from tcpexporter.metrics.series_family import info_family, labelled_family, single_family


def source_families(name: str, report: Report, total: int) -> Iterator[Metric]:
    """Yield the metric families of a source.

    Args:
        name: the name of the source.
        report: the state of the source.
        total: the number of connections that the source tracks.
    """
    yield info_family(
        "tcpexporter_source",
        "Source that the connections are read from (--source).",
        {"source": name},
    )
    yield single_family(
        "tcpexporter_tracked_connections",
        "TCP connections that are tracked, of every port, direction and IP version.",
        "gauge",
        total,
    )
    if report.max_connections is not None:
        yield single_family(
            "tcpexporter_max_connections",
            "Maximum number of TCP connections that can be tracked.",
            "gauge",
            report.max_connections,
        )
    if report.seeded_connections is not None:
        yield single_family(
            "tcpexporter_seeded_connections",
            "Tracked connections that were open at the start, or whose opening was missed;"
            " their age is a lower bound unless it was restored.",
            "gauge",
            report.seeded_connections,
        )
    if report.refused_seeds is not None:
        yield single_family(
            "tcpexporter_refused_seeds",
            "Attempts to add a pre-existing or missed connection that found no free slot.",
            "counter",
            report.refused_seeds,
        )
    if report.kernel_events:
        yield labelled_family(
            "tcpexporter_kernel_events",
            "Connections that the BPF program inserted, removed or refused (map full).",
            "counter",
            "action",
            report.kernel_events,
        )
    if report.uncertain_connections is not None:
        yield single_family(
            "tcpexporter_uncertain_connections",
            "Upper bound of the difference between the exporter's number of connections and"
            " the kernel's, in network namespaces that existed at the start; 0: exact.",
            "gauge",
            report.uncertain_connections,
        )
    if report.kernel_series is not None:
        yield single_family(
            "tcpexporter_kernel_series",
            "Combinations of labels that the BPF program counts separately.",
            "gauge",
            report.kernel_series,
        )
    if report.max_kernel_series is not None:
        yield single_family(
            "tcpexporter_max_kernel_series",
            "Maximum of tcpexporter_kernel_series; further combinations share series.",
            "gauge",
            report.max_kernel_series,
        )
    if report.missed_events is not None:
        yield single_family(
            "tcpexporter_missed_events",
            "Socket state changes for which the kernel skipped the BPF program.",
            "counter",
            report.missed_events,
        )
    if report.reconciliation is not None:
        yield from _reconciliation_families(report.reconciliation)
    if report.state_saved_s is not None:
        yield single_family(
            "tcpexporter_state_saved_timestamp_seconds",
            "Time when connection ages were last saved (--state); 0 before that.",
            "gauge",
            report.state_saved_s,
        )


def _reconciliation_families(done: Reconciliation) -> Iterator[Metric]:
    yield single_family(
        "tcpexporter_reconciliations",
        "Comparisons of the tracked connections with the kernel's socket tables.",
        "counter",
        done.runs,
    )
    yield labelled_family(
        "tcpexporter_corrections",
        "Connections added or removed by reconciliation after a missed event.",
        "counter",
        "kind",
        {"missed_open": done.missed_open, "missed_close": done.missed_close},
    )
    yield single_family(
        "tcpexporter_reconcile_duration_seconds",
        "Duration of the last reconciliation.",
        "gauge",
        done.duration_s,
    )
    yield single_family(
        "tcpexporter_reconcile_interval_seconds",
        "Time between reconciliations if no event is missed; 0: they run only after one.",
        "gauge",
        done.interval_s,
    )
    yield single_family(
        "tcpexporter_last_reconcile_timestamp_seconds",
        "Time when the last reconciliation ended or was found unnecessary; 0 before that.",
        "gauge",
        done.finished_s,
    )
