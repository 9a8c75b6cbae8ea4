# SPDX-License-Identifier: GPL-3.0-only
"""Checks that the counters and gauges of an exposition agree with each other."""

from collections import Counter

from tests.kernel.helpers.ss_oracle import Page
from tests.support import ESTABLISHED

OPENED = "tcp_connections_opened_total"
CLOSED = "tcp_connections_closed_total"
FAILED = "tcp_connections_failed_total"
LIFETIMES = "tcp_connection_duration_seconds"
AGES = "tcp_established_connection_age_seconds"
PRE_EXISTING = "tcpexporter_pre_existing_connections"

Labels = tuple[tuple[str, str], ...]
"""The sorted labels of a series."""


def by_labels(page: Page, name: str) -> "Counter[Labels]":
    """Return the values of a metric by their labels."""
    return Counter(
        {tuple(sorted(each.labels.items())): int(each.value) for each in page.samples(name)}
    )


def total(page: Page, name: str) -> int:
    """Return the sum of a metric over all series."""
    return sum(int(each.value) for each in page.samples(name))


def imbalance(page: Page) -> int:
    """Return opened - closed - established + pre-existing, of all series together.

    It is 0 if no connection opens or closes while the exporter counts.
    """
    opened, closed = total(page, OPENED), total(page, CLOSED)
    return opened - closed - total(page, ESTABLISHED) + total(page, PRE_EXISTING)


def violated(page: Page) -> list[str]:
    """Return a sentence for each identity that does not hold, at a quiet point.

    The page must have histograms.
    """
    found = [f"the counters differ by {imbalance(page)}"] if imbalance(page) else []
    pairs = (
        (CLOSED, f"{LIFETIMES}_count"),
        (ESTABLISHED, f"{AGES}_gcount"),
        (OPENED, None),
    )
    series = by_labels(page, ESTABLISHED).keys()
    for name, other in pairs:
        values = by_labels(page, name)
        if values.keys() != series:
            found.append(f"{name} has other series than {ESTABLISHED}")
        if other is not None and values != by_labels(page, other):
            found.append(f"{name} is {values}, but {other} is {by_labels(page, other)}")
    return found
