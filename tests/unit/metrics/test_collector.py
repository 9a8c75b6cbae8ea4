# SPDX-License-Identifier: GPL-3.0-only
"""Metrics of a scrape: from connections in memory to the exposition."""

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import (
    generate_latest as generate_openmetrics,
)
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tcpexporter import version
from tcpexporter.connections.clients import Chunk
from tcpexporter.connections.parts import Direction, OutboundPort, Parts
from tcpexporter.connections.record import IPV4_PREFIX, LISTENER, SOCKET, Records
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.series import OUTBOUND, REMOTE_PORT, Ledger
from tcpexporter.connections.source import MemorySource, Reconciliation, Report
from tcpexporter.errors import SourceError, TrackerError
from tcpexporter.metrics.collector import (
    Choice,
    ConnectionCollector,
    make_registry,
    make_serving_registry,
)
from tcpexporter.metrics.exporter_status import ConfinementCollector
from tcpexporter.metrics.reload_status import Reloads
from tests.unit.series_rows import series_of_rows

GOLDEN_PAGE = Path(__file__).parents[1] / "data" / "metrics.txt"
LONG_TERM = "netstat_tcp_longterm_connections_total"
ESTABLISHED = "tcp_established_connections"
FOLDED = "tcpexporter_folded_series"
NOW_NS = 1_000 * 10**9
DURATION_S = 6
LABELS = ("port", "tcp_version")
PER_NETNS = Parts(OutboundPort.NONE, by_netns=True)
NETNS = 4026531840
CONFINED = {
    "seccomp": True,
    "landlock": False,
    "unprivileged_user": True,
    "no_capabilities": True,
}

Shown = dict[tuple[str, str], float]
Generate = Callable[[CollectorRegistry], bytes]
Parse = Callable[[str], Iterable[Metric]]


def connections(
    port: int, number: int, *, ip_version: int = 4, age_s: float = DURATION_S
) -> Records:
    made = np.zeros(number, SOCKET)
    made["key"]["local_port"] = port
    made["key"]["remote_port"] = range(40000, 40000 + number)
    made["key"]["netns"] = NETNS
    if ip_version == 4:
        made["key"]["local_address"][:, :12] = IPV4_PREFIX
    made["established_ns"] = NOW_NS - int(age_s * 10**9)
    return made


def listeners(*ports: tuple[int, int]) -> Records:
    return np.array([(NETNS, port, ip_version, 0) for port, ip_version in ports], LISTENER)


def collector_of(
    source: MemorySource,
    *,
    ports: Sequence[int] = (),
    named_ports: Sequence[int] | None = None,
    tcpv6: bool = True,
    simple: bool = False,
    max_series: int = 101,
    bounds_s: Sequence[float] = (),
    directions: Sequence[Direction] = (Direction.INBOUND,),
    labels: Sequence[str] = LABELS,
    names: Mapping[int, str] | None = None,
) -> ConnectionCollector:
    selection = select(
        ports,
        tcpv6=tcpv6,
        directions=directions,
        own_listener=(NETNS, 9690),
        labels=() if simple else labels,
    )
    chosen = named(ports if named_ports is None else named_ports, NETNS, selection)
    return ConnectionCollector(
        source,
        Choice(selection, chosen, DURATION_S),
        max_series=max_series,
        names=None if names is None else lambda: names,
        bounds_s=bounds_s,
        boottime_ns=lambda: NOW_NS,
    )


def serving_registry(
    collected: ConnectionCollector, reloads: Reloads | None = None
) -> CollectorRegistry:
    return make_serving_registry(collected, reloads or Reloads(), tasks=tuple, dropped=int)


def family(collected: ConnectionCollector, name: str) -> Metric | None:
    """Scrape once and return the family with this name."""
    return {each.name: each for each in collected.collect()}.get(name)


def values(collected: ConnectionCollector, name: str) -> Shown:
    """Scrape once and return a family's values by port and IP version."""
    found = family(collected, name)
    assert found
    return {
        (each.labels["port"], each.labels["tcp_version"]): each.value
        for each in found.samples
    }


def test_the_exposition_has_the_corrections_of_its_reconciliation() -> None:
    """The report is read before the connections.

    Otherwise an exposition could have the end of a reconciliation without its corrections.
    """

    class Correcting(MemorySource):
        """A source that reconciles in each call, and then adds a connection."""

        def _reconcile(self) -> None:
            self.chunks.append(connections(443, 1))

        def read(self) -> Iterator[Chunk]:
            yield from super().read()
            self._reconcile()

        def listeners(self) -> Records:
            self._reconcile()
            return super().listeners()

        def report(self) -> Report:
            found = len(self.chunks)
            return Report(reconciliation=Reconciliation(runs=found, missed_open=found))

    shown = {each.name: each for each in collector_of(Correcting()).collect()}
    (corrected, _) = shown["tcpexporter_corrections"].samples
    assert corrected.value == sum(each.value for each in shown[ESTABLISHED].samples)


def duration(collected: ConnectionCollector) -> list[float]:
    found = family(collected, "tcpexporter_duration_seconds")
    assert found
    return [each.value for each in found.samples]


def test_long_term_connections_have_the_minimum_age() -> None:
    """A connection whose age equals the duration is long-term; the test sets the clock."""
    source = MemorySource(
        [
            connections(443, 3, age_s=DURATION_S + 1),
            connections(443, 5, age_s=DURATION_S),
            connections(443, 7, age_s=DURATION_S - 1e-5),
        ]
    )
    collected = collector_of(source)
    assert values(collected, LONG_TERM) == {("443", "4"): 8}
    assert values(collected, ESTABLISHED) == {("443", "4"): 15}


def test_the_clock_is_boottime() -> None:
    """By default the age is measured on CLOCK_BOOTTIME."""
    source = MemorySource([connections(443, 3)])
    selection = select((), tcpv6=True, directions=[Direction.INBOUND])
    choice = Choice(selection, named((), NETNS, selection), 1)
    collected = ConnectionCollector(source, choice, max_series=1)
    source.chunks[0]["established_ns"] = _boottime_ns()
    assert values(collected, LONG_TERM) == {("443", "4"): 0}
    source.chunks[0]["established_ns"] -= 1_000_000_000
    assert values(collected, LONG_TERM) == {("443", "4"): 3}


def _boottime_ns() -> int:
    """Return CLOCK_BOOTTIME in ns, from /proc/uptime, which has hundredths of a second."""
    return int(Path("/proc/uptime").read_text().split()[0].replace(".", "")) * 10**7


def test_a_listener_has_a_series_at_0() -> None:
    """A listening port has a series from the first scrape on, per IP version."""
    source = MemorySource(listeners=listeners((443, 4), (443, 6), (80, 6), (9690, 4)))
    collected = collector_of(source)
    expected: Shown = {("443", "4"): 0, ("443", "6"): 0, ("80", "6"): 0}
    assert values(collected, LONG_TERM) == expected
    assert values(collected, ESTABLISHED) == expected


def test_a_named_port_has_a_series_at_0() -> None:
    """A port named by --port has a series without a listener; other ports have none."""
    source = MemorySource(
        [connections(80, 3)], listeners=listeners((80, 4), (22, 6), (8443, 4))
    )
    collected = collector_of(source, ports=[443, 8443])
    assert values(collected, ESTABLISHED) == {
        ("443", "4"): 0,
        ("443", "6"): 0,
        ("8443", "4"): 0,
        ("8443", "6"): 0,
    }


def test_without_ipv6_there_is_no_ipv6_series() -> None:
    """With tcpv6=False no port, listener or connection has an IPv6 series."""
    source = MemorySource(
        [connections(443, 3, ip_version=6)], listeners=listeners((443, 6), (8443, 6))
    )
    collected = collector_of(source, named_ports=[443], tcpv6=False)
    assert values(collected, ESTABLISHED) == {("443", "4"): 0}


def test_a_published_port_keeps_its_series() -> None:
    """After its connections or listener are gone, a port keeps its series at 0."""
    source = MemorySource(
        [connections(443, 3), connections(8443, 5, ip_version=6)],
        listeners=listeners((22, 4)),
    )
    collected = collector_of(source)
    first: Shown = {("443", "4"): 3, ("8443", "6"): 5, ("22", "4"): 0}
    assert values(collected, ESTABLISHED) == first
    assert values(collected, LONG_TERM) == first
    source.chunks = []
    source._listeners = listeners()
    assert values(collected, ESTABLISHED) == dict.fromkeys(first, 0)
    assert values(collected, LONG_TERM) == dict.fromkeys(first, 0)


def test_two_collectors_share_no_series_at_0() -> None:
    """A collector does not publish series that only another one has published."""
    source = MemorySource([connections(443, 3)])
    selection = select((), tcpv6=True, directions=[Direction.INBOUND])
    choice = Choice(selection, named((), NETNS, selection), 0)
    first, second = (
        ConnectionCollector(each, choice, max_series=1) for each in (source, MemorySource())
    )
    assert values(first, ESTABLISHED) == {("443", "4"): 3}
    assert values(second, ESTABLISHED) == {}


def choice(*ports: int, duration_s: int = DURATION_S) -> Choice:
    selection = select(
        ports, tcpv6=True, directions=[Direction.INBOUND], own_listener=(NETNS, 9690)
    )
    return Choice(selection, named(ports, NETNS, selection), duration_s)


def test_a_new_duration_applies_from_the_next_scrape() -> None:
    """It applies to all connections, its metric changes, and no series is removed."""
    source = MemorySource([connections(443, 3, age_s=20), connections(80, 5, age_s=10)])
    collected = collector_of(source)
    assert values(collected, LONG_TERM) == {("443", "4"): 3, ("80", "4"): 5}
    collected.choose(choice(duration_s=15))
    assert values(collected, LONG_TERM) == {("443", "4"): 3, ("80", "4"): 0}
    assert duration(collected) == [15]


def test_new_ports_apply_from_the_next_scrape() -> None:
    """Series of ports no longer selected are removed; newly named ports have a series."""
    source = MemorySource([connections(443, 3), connections(80, 5)])
    collected = collector_of(source)
    assert values(collected, ESTABLISHED) == {("443", "4"): 3, ("80", "4"): 5}
    collected.choose(choice(443, 8443))
    named_now: Shown = {
        ("443", "4"): 3,
        ("443", "6"): 0,
        ("8443", "4"): 0,
        ("8443", "6"): 0,
    }
    assert values(collected, ESTABLISHED) == named_now
    source.chunks.clear()
    collected.choose(choice())
    assert values(collected, ESTABLISHED) == dict.fromkeys(named_now, 0)


def test_the_folded_series_is_removed_with_its_ports() -> None:
    """Named ports are not folded, so no series port="other" remains at 0."""
    source = MemorySource([connections(443, 3), connections(80, 5)])
    collected = collector_of(source, max_series=1)
    assert values(collected, ESTABLISHED) == {("80", "4"): 5, ("other", "4"): 3}
    collected.choose(choice(443))
    assert values(collected, ESTABLISHED) == {("443", "4"): 3, ("443", "6"): 0}


def test_a_failed_reload_is_a_metric() -> None:
    """If one file fails, the result stays a failure until that file succeeds."""
    reloads = Reloads()
    registry = serving_registry(collector_of(MemorySource()), reloads)
    name = "tcpexporter_config_last_reload"

    def shown() -> tuple[float | None, float | None]:
        return (
            registry.get_sample_value(f"{name}_successful"),
            registry.get_sample_value(f"{name}_success_timestamp_seconds"),
        )

    began_s = reloads.succeeded_s
    assert shown() == (1, began_s)
    reloads.record("settings", successful=False)
    reloads.record("web configuration", successful=True)
    assert shown() == (0, began_s)
    reloads.record("settings", successful=True)
    assert shown() == (1, reloads.succeeded_s)
    assert reloads.succeeded_s > began_s


def test_simple_exports_one_number_without_labels() -> None:
    """The number is the sum over all ports and both IP versions."""
    source = MemorySource(
        [
            connections(443, 3),
            connections(443, 5, ip_version=6),
            connections(80, 7, age_s=0),
        ],
        listeners=listeners((22, 4)),
    )
    collected = collector_of(source, simple=True)
    for name, expected in ((LONG_TERM, 8), (ESTABLISHED, 15)):
        found = family(collected, name)
        assert found
        assert [(each.labels, each.value) for each in found.samples] == [({}, expected)]


def test_simple_adds_up_selected_ports_only() -> None:
    """The number is the sum over the ports of --port."""
    source = MemorySource([connections(443, 3), connections(80, 5)])
    found = family(collector_of(source, simple=True, ports=[443]), LONG_TERM)
    assert found
    assert [each.value for each in found.samples] == [3]


def folded(collected: ConnectionCollector) -> float:
    """Scrape once and return the number of folded series."""
    found = family(collected, FOLDED)
    assert found
    (sample,) = found.samples
    return sample.value


def test_the_smallest_series_are_folded_into_other() -> None:
    """Above max_series, both metrics have one series port="other" per IP version."""
    source = MemorySource(
        [
            connections(443, 13),
            connections(80, 3),
            connections(22, 5, ip_version=6),
            connections(8443, 2, age_s=0),
        ],
        listeners=listeners((5432, 4), (5432, 6)),
    )
    collected = collector_of(source, max_series=1)
    assert values(collected, ESTABLISHED) == {
        ("443", "4"): 13,
        ("other", "4"): 5,
        ("other", "6"): 5,
    }
    assert values(collected, LONG_TERM) == {
        ("443", "4"): 13,
        ("other", "4"): 3,
        ("other", "6"): 5,
    }
    assert folded(collected) == 5


def test_the_folded_series_exists_from_its_first_use() -> None:
    """Before any series is folded it does not exist; afterwards it stays at 0."""
    source = MemorySource([connections(443, 13)])
    collected = collector_of(source, max_series=1)
    assert values(collected, ESTABLISHED) == {("443", "4"): 13}
    assert folded(collected) == 0
    source.chunks.append(connections(80, 3))
    assert values(collected, ESTABLISHED) == {("443", "4"): 13, ("other", "4"): 3}
    assert folded(collected) == 1
    source.chunks.pop()
    assert values(collected, ESTABLISHED) == {("443", "4"): 13, ("other", "4"): 0}
    assert folded(collected) == 0


def test_ports_seen_once_are_kept_up_to_max_series() -> None:
    """New ports at each scrape do not increase the exposition or memory; none is folded."""
    source = MemorySource()
    collected = collector_of(source, max_series=7)
    for port in range(1, 212):
        source.chunks = [connections(port, 1)]
        shown = values(collected, ESTABLISHED)
        assert shown[str(port), "4"] == 1
        assert len(shown) == len(collected._published) == min(port, 7)
    assert folded(collected) == 0


def test_named_ports_are_not_folded() -> None:
    """All ports of --port have series, even if they are more than max_series."""
    source = MemorySource([connections(443, 3), connections(80, 5)])
    collected = collector_of(source, named_ports=[22, 443], max_series=1)
    assert values(collected, ESTABLISHED) == {
        ("22", "4"): 0,
        ("22", "6"): 0,
        ("443", "4"): 3,
        ("443", "6"): 0,
        ("other", "4"): 5,
    }
    assert folded(collected) == 1


def test_simple_ignores_max_series() -> None:
    """It does not read listeners either."""
    source = SourceWithoutListeners([connections(443, 3), connections(80, 5)])
    collected = collector_of(source, simple=True, max_series=1)
    found = family(collected, ESTABLISHED)
    assert found
    assert [(each.labels, each.value) for each in found.samples] == [({}, 8)]
    assert folded(collected) == 0


def test_help_is_the_same_in_every_run() -> None:
    """Help texts do not depend on settings: node_exporter refuses two texts for one name.

    The kind of fault: a help text has a value that may differ between runs.
    """
    by_default, *others = (
        collector_of(example()),
        collector_of(example(), ports=[443], tcpv6=False, max_series=1),
        collector_of(example(), simple=True),
        ConnectionCollector(example(), choice(duration_s=15), max_series=7),
        by_netns(example(), {NETNS: "self"}),
    )
    expected = {each.name: each.documentation for each in by_default.collect()}
    for other in others:
        assert {each.name: each.documentation for each in other.collect()} == expected


def test_the_duration_is_a_metric() -> None:
    """It is the duration in force."""
    assert duration(collector_of(MemorySource())) == [6]


def test_an_exposition_for_node_exporter_has_no_process_metrics() -> None:
    """Node_exporter has process metrics of its own; a scrape has ours."""
    printed = {each.name for each in make_registry(collector_of(example())).collect()}
    registry = serving_registry(collector_of(example()))
    served = {each.name for each in registry.collect()}
    assert {name.partition("_")[0] for name in printed} == {"netstat", "tcp", "tcpexporter"}
    more = {name.partition("_")[0] for name in served - printed}
    assert more == {"process", "python", "tcpexporter"}
    assert printed < served


def test_tracked_connections_include_unselected_ports() -> None:
    """tcpexporter_tracked_connections does not depend on --port."""
    source = MemorySource([connections(80, 5), connections(9690, 2)])
    found = family(collector_of(source, ports=[443]), "tcpexporter_tracked_connections")
    assert found
    assert [each.value for each in found.samples] == [7]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ({}, None),
        ({"inserted": 7, "refused": 0}, {"inserted": 7, "refused": 0}),
    ],
)
def test_kernel_events_exist_if_the_source_has_them(
    events: Mapping[str, int], expected: Mapping[str, int] | None
) -> None:
    """The BPF program's counters have a label action; polling sources have no counters."""
    source = MemorySource(report=Report(kernel_events=events))
    found = family(collector_of(source), "tcpexporter_kernel_events")
    shown = found and {each.labels["action"]: each.value for each in found.samples}
    assert shown == expected
    if found:
        assert {each.name for each in found.samples} == {"tcpexporter_kernel_events_total"}


@pytest.mark.parametrize("most", [None, 262144])
def test_max_connections_exists_if_the_source_has_a_maximum(most: int | None) -> None:
    """A polling source has no maximum."""
    source = MemorySource(report=Report(max_connections=most))
    found = family(collector_of(source), "tcpexporter_max_connections")
    assert (found and [each.value for each in found.samples]) == (most and [most])


def by_netns(
    source: MemorySource, names: Mapping[int, str], *, max_series: int = 101
) -> ConnectionCollector:
    """Return a collector with series per namespace, on a clock that a test can set."""
    selection = select(
        (),
        tcpv6=True,
        directions=[Direction.INBOUND],
        labels=(*LABELS, "netns"),
    )
    return ConnectionCollector(
        source,
        Choice(selection, named((), NETNS, selection), DURATION_S),
        max_series=max_series,
        names=lambda: names,
        boottime_ns=lambda: clock_ns[0],
    )


clock_ns = [NOW_NS]


def netns_labels(collected: ConnectionCollector) -> dict[str, float]:
    found = family(collected, ESTABLISHED)
    assert found
    return {each.labels["netns"]: each.value for each in found.samples}


def test_a_namespace_has_its_name_or_its_inode() -> None:
    """With series per namespace, the label netns is the name. Without a name it is the
    inode."""
    elsewhere = connections(443, 5)
    elsewhere["key"]["netns"] = 17
    source = MemorySource([connections(443, 3), elsewhere], parts=PER_NETNS)
    assert netns_labels(by_netns(source, {NETNS: "self"})) == {"self": 3, "17": 5}


def test_series_of_a_namespace_that_is_gone_are_removed() -> None:
    """They are removed FORGET_NS after the last socket and name, not at once."""
    elsewhere = connections(443, 5)
    elsewhere["key"]["netns"] = 17
    source = MemorySource([connections(443, 3), elsewhere], parts=PER_NETNS)
    collected = by_netns(source, {NETNS: "self"})
    assert netns_labels(collected) == {"self": 3, "17": 5}
    source.chunks = []
    assert netns_labels(collected) == {"self": 0, "17": 0}
    clock_ns[0] += 3600 * 10**9
    assert netns_labels(collected) == {"self": 0}


def test_a_namespace_with_a_name_keeps_its_series() -> None:
    """They stay while the namespace has a name, even without any socket."""
    elsewhere = connections(443, 5)
    elsewhere["key"]["netns"] = 17
    source = MemorySource([connections(443, 3), elsewhere], parts=PER_NETNS)
    names = {NETNS: "self", 17: "blue"}
    collected = by_netns(source, names)
    assert netns_labels(collected) == {"self": 3, "blue": 5}
    source.chunks = []
    assert netns_labels(collected) == {"self": 0, "blue": 0}
    clock_ns[0] += 3600 * 10**9
    assert netns_labels(collected) == {"self": 0, "blue": 0}
    del names[17]
    assert netns_labels(collected) == {"self": 0}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("container:0123456789ab", None),
        ("container:0123456789ab", "green"),
        ("17", None),
        (None, "green"),
    ],
)
def test_another_namespace_with_the_same_inode_has_no_series_of_the_first(
    before: str | None, after: str | None
) -> None:
    """The kernel reuses inodes: a new container must not have the ports of an old one."""
    first, second = connections(443, 5), connections(80, 7)
    first["key"]["netns"] = second["key"]["netns"] = 17
    source = MemorySource([first], parts=PER_NETNS)
    names = {NETNS: "self", **({17: before} if before else {})}
    collected = by_netns(source, names)
    assert netns_labels(collected) == {before or "17": 5}
    source.chunks = [second]
    names.pop(17, None)
    names |= {17: after} if after else {}
    found = family(collected, ESTABLISHED)
    assert found
    assert [
        (each.labels["netns"], each.labels["port"], each.value) for each in found.samples
    ] == [(after or "17", "80", 7)]


def test_namespaces_are_folded_too() -> None:
    """Ports fold within a namespace; the smallest namespaces fold into netns="other"."""
    chunks = [connections(443, number) for number in (13, 1, 2, 3)]
    for netns, chunk in enumerate(chunks, start=17):
        chunk["key"]["netns"] = netns
    collected = by_netns(MemorySource(chunks, parts=PER_NETNS), {17: "blue"}, max_series=1)
    found = family(collected, ESTABLISHED)
    assert found
    assert {
        (each.labels["netns"], each.labels["port"]): each.value for each in found.samples
    } == {("blue", "443"): 13, ("18", "other"): 1, ("other", "other"): 5}
    assert folded(collected) == 3


def test_the_folded_series_of_a_namespace_that_is_gone_is_removed() -> None:
    """It is removed at the same time as the series of its ports."""
    elsewhere = connections(443, 5)
    elsewhere["key"]["netns"] = 17
    source = MemorySource([connections(443, 13), elsewhere], parts=PER_NETNS)
    collected = by_netns(source, {NETNS: "self"}, max_series=1)
    assert netns_labels(collected) == {"self": 13, "17": 5}
    source.chunks.pop()
    assert netns_labels(collected) == {"self": 13, "17": 0}
    clock_ns[0] += 3600 * 10**9
    assert netns_labels(collected) == {"self": 13}


class BrokenSource(MemorySource):
    """A source whose read fails at the end."""

    broken = True

    def read(self) -> Iterator[Chunk]:
        yield from super().read()
        if self.broken:
            raise TrackerError("the kernel refuses to read the map")


class SourceWithoutListeners(MemorySource):
    """A source that cannot read listeners."""

    def listeners(self) -> Records:
        raise SourceError("sock_diag does not answer")


@pytest.mark.parametrize(
    "broken", [BrokenSource([connections(443, 3)]), SourceWithoutListeners()]
)
@pytest.mark.parametrize("generate", [generate_latest, generate_openmetrics])
def test_a_source_that_cannot_be_read_gives_an_error(
    broken: MemorySource, generate: Generate
) -> None:
    """Collecting raises the error instead of returning some families."""
    registry = CollectorRegistry()
    registry.register(collector_of(broken))
    with pytest.raises(SourceError):
        generate(registry)


def test_a_source_recovers_after_an_error() -> None:
    """The next scrape is complete."""
    source = BrokenSource([connections(443, 3)])
    collected = collector_of(source)
    with pytest.raises(SourceError):
        list(collected.collect())
    source.broken = False
    assert values(collected, ESTABLISHED) == {("443", "4"): 3}


class SourceWithAttempts(MemorySource):
    """A source with outbound attempts that have failed, as many as ``failed`` says."""

    failed: Mapping[bytes, int] = {}
    """By series; the source has each of these series."""

    def ledger(self) -> Ledger:
        found = super().ledger()
        failed = np.array([self.failed.get(each, 0) for each in found.series.tolist()])
        return replace(found, failed=failed)


def attempts(number: int, *, remote_port: int = 0) -> dict[bytes, int]:
    """Return failed attempts over IPv4, as the BPF program counts them."""
    flags = OUTBOUND | (REMOTE_PORT if remote_port else 0)
    return {series_of_rows([(4, flags, remote_port)]).tolist()[0]: number}


def example(bounds_s: Sequence[float] = ()) -> MemorySource:
    """Return a source whose exposition has every metric of the ebpf source."""
    source = SourceWithAttempts(
        [
            connections(443, 7),
            connections(443, 5, ip_version=6, age_s=60),
            connections(443, 3, age_s=0),
            connections(8443, 2, ip_version=6, age_s=5.9),
        ],
        listeners=listeners((22, 4), (22, 6), (9690, 4)),
        report=Report(
            max_connections=262144,
            kernel_events={"inserted": 19, "removed": 2, "refused": 0},
            uncertain_connections=6,
            kernel_series=4,
            max_kernel_series=65536,
            missed_events=3,
            seeded_connections=5,
            refused_seeds=1,
            reconciliation=Reconciliation(
                runs=11,
                missed_open=2,
                missed_close=1,
                duration_s=0.25,
                finished_s=1795000000.5,
                interval_s=60.0,
            ),
        ),
        name="ebpf",
        parts=Parts(OutboundPort.LOCAL, by_netns=False),
        bounds_s=bounds_s,
    )
    opened, pre_existing, *others = map(source.counted.count, source.chunks)
    source.counted.record_pre_existing(pre_existing.words)
    for each in (opened, *others):
        source.counted.record_opened(each.words)
    for closed in (connections(443, 11, age_s=30), connections(443, 13, age_s=0.5)):
        closed_words = source.counted.count(closed).words
        source.counted.record_opened(closed_words)
        source.counted.record_closed(closed_words, NOW_NS)
    attempted = connections(0, 1)
    attempted["is_outbound"] = 1
    source.counted.count(attempted)
    source.failed = attempts(17)
    return source


@pytest.mark.parametrize("bounds_s", [(), (1.0, 6.0, 60.0)])
@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize(
    ("generate", "parse"),
    [(generate_latest, parse_text), (generate_openmetrics, parse_openmetrics)],
)
def test_both_formats_parse(
    generate: Generate, parse: Parse, *, simple: bool, bounds_s: Sequence[float]
) -> None:
    """prometheus_client parses every sample, each once and with a help text."""
    registry = serving_registry(
        collector_of(
            example(bounds_s), simple=simple, bounds_s=bounds_s, directions=[*Direction]
        )
    )
    families = list(parse(generate(registry).decode()))
    assert all(each.documentation and each.type != "unknown" for each in families)
    shown = [
        (each.name, tuple(sorted(each.labels.items())))
        for family in families
        for each in family.samples
    ]
    assert len(shown) == len(set(shown))
    samples = {each.name: each.value for family in families for each in family.samples}
    assert samples["tcpexporter_tracked_connections"] == 17
    assert samples["tcpexporter_kernel_events_total"] in (19, 2, 0)
    assert samples["tcpexporter_build_info"] == samples["tcpexporter_source_info"] == 1
    assert samples["process_start_time_seconds"] > 0
    assert "tcpexporter_collect_duration_seconds" in samples
    assert (LONG_TERM, ()) in shown if simple else (LONG_TERM, ()) not in shown


def test_the_exposition_equals_the_golden_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, help texts, labels and their order are equal."""
    monkeypatch.setattr(version, "VERSION", "1.2.3")
    monkeypatch.setattr(version, "REVISION", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.2")
    bounds_s = (1.0, 6.0, 60.0)
    registry = make_registry(
        collector_of(
            example(bounds_s),
            named_ports=[22, 443, 8443, 9100],
            bounds_s=bounds_s,
            directions=[*Direction],
        )
    )
    registry.register(ConfinementCollector(CONFINED))
    page = generate_latest(registry).decode()
    name = "tcpexporter_collect_duration_seconds"
    took = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert took
    assert 0 < float(took[1]) < 60
    page = page.replace(took[0], f"{name} 0.001")
    assert page == GOLDEN_PAGE.read_text()
