# SPDX-License-Identifier: GPL-3.0-only
"""The metric families of the rules of --expect."""

from collections.abc import Sequence

import pytest

from tcpexporter.config.rules import parse_rules
from tcpexporter.connections.parts import Direction, kernel_parts
from tcpexporter.connections.record import Records
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import MemorySource
from tcpexporter.metrics.collector import Choice, ConnectionCollector
from tests.rule_oracle import connection, records
from tests.unit.made_cgroups import PATHS, made_owners

NOW_NS = 1_000 * 10**9
DURATION_S = 6
ESTABLISHED = "tcp_expected_connections"
LONG_TERM = "tcp_expected_longterm_connections"
MINIMUM = "tcp_expected_minimum"

SSH, BELOW_SSH, DOCKER, *_ = PATHS


def opened(
    remote: str, number: int, *, age_s: float = 60, cgroup: int = 0, outbound: int = 1
) -> Records:
    local = "[2001:db8::2]:40000" if "[" in remote else "192.0.2.1:40000"
    made = records([connection(local, remote, outbound)] * number)
    made["established_ns"] = NOW_NS - int(age_s * 10**9)
    made["cgroup"] = cgroup
    return made


def collected(
    rules: str,
    *chunks: Records,
    ports: Sequence[int] = (),
    labels: Sequence[str] = ("port", "tcp_version"),
    has_units: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the values of the families of rules, by the name of the rule."""
    parts = kernel_parts([Direction.INBOUND], labels, by_cgroup=has_units)
    owners = made_owners(labels) if has_units else None
    selection = select(
        ports, tcpv6=True, directions=[Direction.INBOUND], labels=labels, owners=owners
    )
    collector = ConnectionCollector(
        MemorySource(chunks, parts=parts),
        Choice(selection, named(ports, 0, selection), DURATION_S, parse_rules(rules)),
        max_series=101,
        owners=owners,
        boottime_ns=lambda: NOW_NS,
    )
    found: dict[str, dict[str, float]] = {}
    for _ in range(2):  # the second scrape has the same values
        before, found = (
            found,
            {
                family.name: {each.labels["name"]: each.value for each in family.samples}
                for family in collector.collect()
                if family.name.startswith("tcp_expected")
            },
        )
    assert before == found
    return found


def test_without_rules_there_is_no_metric() -> None:
    """A scrape then reads no record."""
    assert collected("", opened("192.0.2.10:5432", 3)) == {}


def test_each_rule_has_three_metrics() -> None:
    """A connection is long-term if it is as old as --duration."""
    chunks = [
        opened("192.0.2.10:5432", 7),
        opened("192.0.2.10:5432", 5, age_s=DURATION_S + 0.001),
        opened("192.0.2.10:5432", 3, age_s=DURATION_S - 0.001),
        opened("[2001:db8::1]:443", 2),
    ]
    assert collected("db=remote=192.0.2.10:5432,min=13 web=remote=::/0", *chunks) == {
        ESTABLISHED: {"db": 15, "web": 2},
        LONG_TERM: {"db": 12, "web": 2},
        MINIMUM: {"db": 13, "web": 1},
    }


def test_the_metrics_exist_without_a_connection() -> None:
    """An alert must not depend on a first connection."""
    assert collected("db=remote=192.0.2.10:5432") == {
        ESTABLISHED: {"db": 0},
        LONG_TERM: {"db": 0},
        MINIMUM: {"db": 1},
    }


@pytest.mark.parametrize("ports", [(), (443,)])
def test_rules_match_connections_that_are_not_selected(ports: Sequence[int]) -> None:
    """The selection has inbound connections only, of all ports or of one."""
    found = collected("db=direction=outbound", opened("192.0.2.10:5432", 3), ports=ports)
    assert found[LONG_TERM] == {"db": 3}


@pytest.mark.parametrize("labels", [("port",), ("port", "unit"), ("port", "container")])
def test_a_rule_can_require_a_unit(labels: Sequence[str]) -> None:
    """A unit also owns the cgroups below its own, whatever --labels is."""
    chunks = [
        opened("192.0.2.10:5432", 2, cgroup=SSH),
        opened("192.0.2.10:5432", 3, cgroup=BELOW_SSH),
        opened("192.0.2.11:5432", 5, cgroup=SSH),
        opened("192.0.2.10:5432", 7, cgroup=DOCKER),
    ]
    rules = "a=unit=ssh.service b=unit=ssh.service,remote=192.0.2.10 c=unit=no.service"
    found = collected(rules, *chunks, labels=labels, has_units=True)
    assert found[ESTABLISHED] == {"a": 10, "b": 5, "c": 0}
