# SPDX-License-Identifier: GPL-3.0-only
"""Metric families of the connections that rules expect (--expect)."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import Metric

from tcpexporter.connections.expected import Rule
from tcpexporter.connections.matching import count_expected
from tcpexporter.connections.series import SERIES, SERIES_BYTES
from tcpexporter.connections.sets import is_in
from tcpexporter.connections.slot_counts import first_young
from tcpexporter.connections.source import Source
from tcpexporter.metrics.owner_numbers import OwnerNumbers
from tcpexporter.metrics.series_family import LabelSets, SeriesFamily


def expected_families(
    source: Source, rules: Sequence[Rule], since_ns: int, owners: OwnerNumbers | None
) -> Iterator[Metric]:
    """Yield the metric families of rules; without rules there are none.

    Args:
        source: the source of the connections.
        rules: the rules.
        since_ns: a connection is long-term if it was established at this time or before.
        owners: the owners of cgroups; None: no rule has a unit.

    Raises:
        SourceError: the source cannot be read.
    """
    if not rules:
        return
    # Without units, the ledger is not read.
    has_units = owners is not None and any(each.unit for each in rules)
    series = source.ledger().series if has_units else np.empty(0, SERIES_BYTES)
    cgroups = series.view(SERIES)["cgroup"].astype(np.uint64)

    def of_unit(unit: str) -> npt.NDArray[np.bool_]:
        return is_in(cgroups, owners.cgroups_of(unit, cgroups) if owners else [])

    found = count_expected(source.records(), rules, first_young(since_ns), of_unit)
    names = LabelSets(("name",), [(each.name,) for each in rules])
    for name, text, numbers in (
        (
            "tcp_expected_connections",
            "Established TCP connections that match a rule of --expect.",
            found.established.tolist(),
        ),
        (
            "tcp_expected_longterm_connections",
            "Long-term TCP connections that match a rule of --expect.",
            found.long_term.tolist(),
        ),
        (
            "tcp_expected_minimum",
            "Minimum number of connections that a rule of --expect requires.",
            [each.minimum for each in rules],
        ),
    ):
        yield SeriesFamily(name, text, "gauge", names, numbers)
