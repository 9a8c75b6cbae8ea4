# SPDX-License-Identifier: GPL-3.0-only
"""Metric families of the distinct clients of each series."""

from collections.abc import Iterator

from prometheus_client import Metric

from tcpexporter.connections.clients import ClientCounts
from tcpexporter.metrics.series_family import LabelSets, SeriesFamily


def client_families(clients: ClientCounts, labels: LabelSets) -> Iterator[Metric]:
    """Yield the metric families of clients.

    Args:
        clients: the numbers of each series.
        labels: the labels of each series.
    """
    yield SeriesFamily(
        "tcp_established_clients",
        "Distinct clients (--client-prefix) that have an established TCP connection.",
        "gauge",
        labels,
        clients.established.tolist(),
    )
    yield SeriesFamily(
        "tcp_longterm_clients",
        "Distinct clients that have a TCP connection of at least"
        " tcpexporter_duration_seconds.",
        "gauge",
        labels,
        clients.long_term.tolist(),
    )
    yield SeriesFamily(
        "tcp_largest_client_connections",
        "Established TCP connections of the client that has most; nearly all of them if the"
        " clients come through a proxy.",
        "gauge",
        labels,
        clients.largest.tolist(),
    )
