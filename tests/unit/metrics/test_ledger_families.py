# SPDX-License-Identifier: GPL-3.0-only
"""Counters and histograms of connections, which agree with the gauges."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections import memory_ledger
from tcpexporter.connections.parts import Direction, kernel_parts
from tcpexporter.connections.record import Records
from tcpexporter.connections.selection import named, select
from tcpexporter.connections.source import MemorySource
from tcpexporter.metrics.collector import FORGET_NS, Choice, ConnectionCollector
from tcpexporter.metrics.series_labels import Labels
from tests.unit.connections.test_counting import some_labels
from tests.unit.metrics.test_collector import (
    DURATION_S,
    ESTABLISHED,
    LONG_TERM,
    NETNS,
    NOW_NS,
    PER_NETNS,
    SourceWithAttempts,
    attempts,
    collector_of,
    connections,
    example,
    family,
    listeners,
)

OPENED = "tcp_connections_opened_total"
CLOSED = "tcp_connections_closed_total"
FAILED = "tcp_connections_failed_total"
LIFETIMES = "tcp_connection_duration_seconds"
AGES = "tcp_established_connection_age_seconds"
PRE_EXISTING = "tcpexporter_pre_existing_connections"

BOTH = (Direction.INBOUND, Direction.OUTBOUND)
BOUNDS_S = (1.0, 6.0, 60.0)

Page = Mapping[str, Mapping[Labels, float]]


def scrape(collected: ConnectionCollector) -> Page:
    """Return the values of each sample name, by the label values; ``le`` is the last."""
    page: dict[str, dict[Labels, float]] = {}
    for sample in (each for found in collected.collect() for each in found.samples):
        values = page.setdefault(sample.name, {})
        labels = tuple(sample.labels.values())
        assert labels not in values
        values[labels] = sample.value
    return page


def outbound(remote_port: int, number: int, *, age_s: float = DURATION_S) -> Records:
    """Return outbound connections to one port, each from its own local port."""
    made = connections(0, number, age_s=age_s)
    made["key"]["local_port"] = range(50000, 50000 + number)
    made["key"]["remote_port"] = remote_port
    made["is_outbound"] = Direction.OUTBOUND
    return made


def elsewhere(netns: int, port: int, number: int) -> Records:
    """Return connections in another network namespace."""
    made = connections(port, number)
    made["key"]["netns"] = netns
    return made


def source_of(*chunks: Records, labels: Sequence[str]) -> MemorySource:
    """Return a source with these open connections, each opened while it counted."""
    source = MemorySource(chunks, parts=kernel_parts(BOTH, labels))
    for each in chunks:
        source.counted.record_opened(source.counted.count(each).words)
    return source


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("port",), {("443",): 8, ("50000",): 1, ("50001",): 1}),
        (("tcp_version",), {("4",): 5, ("6",): 5}),
        (("direction",), {("inbound",): 8, ("outbound",): 2}),
        (("remote_port",), {("",): 8, ("5432",): 2}),
        (("port", "remote_port"), {("443", ""): 8, ("", "5432"): 2}),
        (
            ("port", "tcp_version", "direction", "remote_port"),
            {
                ("443", "4", "inbound", ""): 3,
                ("443", "6", "inbound", ""): 5,
                ("", "4", "outbound", "5432"): 2,
            },
        ),
        (("netns",), {("blue",): 10}),
        ((), {(): 10}),
    ],
)
def test_a_series_has_the_labels_that_are_chosen(
    labels: Sequence[str], expected: Mapping[Labels, int]
) -> None:
    """An ephemeral port is no label value if the labels have remote_port."""
    source = source_of(
        connections(443, 3),
        connections(443, 5, ip_version=6),
        outbound(5432, 2),
        labels=labels,
    )
    collected = collector_of(
        source,
        directions=BOTH,
        labels=labels,
        names={NETNS: "blue"} if "netns" in labels else None,
    )
    page = scrape(collected)
    assert page[ESTABLISHED] == page[LONG_TERM] == page[OPENED] == expected
    assert page[CLOSED] == dict.fromkeys(expected, 0)


def test_a_listener_has_a_series_for_any_labels() -> None:
    """It is 0 without connections. A named remote port has one too."""
    for labels, expected in (
        (("direction",), {("inbound",)}),
        (("tcp_version",), {("4",), ("6",)}),
        (("port", "remote_port"), {("22", ""), ("443", ""), ("", "22"), ("", "443")}),
    ):
        source = MemorySource(
            listeners=listeners((22, 4), (443, 6)), parts=kernel_parts(BOTH, labels)
        )
        collected = collector_of(source, ports=[22, 443], directions=BOTH, labels=labels)
        for _ in range(2):
            page = scrape(collected)
            assert page[ESTABLISHED] == page[OPENED] == dict.fromkeys(expected, 0)


def test_failed_attempts_are_counted_for_outbound_connections_only() -> None:
    """Otherwise the metric would always be 0, as the BPF program does not count them."""
    assert family(collector_of(example()), FAILED.removesuffix("_total")) is None
    page = scrape(collector_of(example(), directions=BOTH))
    assert page[FAILED] == {("", "4"): 17}


def test_a_counter_of_failed_attempts_begins_at_0() -> None:
    """Otherwise ``rate()`` would not see the first failure to connect to a server."""
    for labels, expected in (
        (("remote_port",), {("5432",): 0}),
        (("port", "remote_port"), {("", "5432"): 0}),
        (("direction",), {("outbound",): 0}),
    ):
        source = source_of(connections(443, 3), outbound(5432, 2), labels=labels)
        page = scrape(collector_of(source, directions=BOTH, labels=labels))
        assert page[FAILED] == expected


def test_a_failed_attempt_has_no_local_port() -> None:
    """Its series has no port, and so no other metric has that series."""
    page = scrape(collector_of(example((1.0,)), directions=BOTH, bounds_s=(1.0,)))
    for name in (ESTABLISHED, LONG_TERM, OPENED, CLOSED, f"{LIFETIMES}_count"):
        assert ("", "4") not in page[name]
        assert ("443", "4") in page[name]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((), {()}),
        (("tcp_version",), {("4",)}),
        (("remote_port",), {("5432",), ("",)}),
        (("port", "remote_port"), {("443", ""), ("", "5432")}),
    ],
)
def test_a_series_in_which_every_attempt_has_failed_is_0(
    labels: Sequence[str], expected: set[Labels]
) -> None:
    """If a client cannot reach its server, the series is 0 and not missing.

    So --simple always has a number, and a published series stays.
    """
    source = SourceWithAttempts(
        [outbound(5432, 1)],
        listeners=listeners((443, 4)),
        parts=kernel_parts(BOTH, labels),
    )
    collected = collector_of(source, directions=BOTH, labels=labels)
    attempted = outbound(5432, 1)
    attempted["key"]["local_port"] = 0
    source.counted.count(attempted)
    source.failed = attempts(3, remote_port=5432 if "remote_port" in labels else 0)
    assert sum(source.ledger().failed) == 3
    assert scrape(collected)[ESTABLISHED].keys() == expected
    source.chunks = []
    page = scrape(collected)
    assert page[ESTABLISHED] == page[LONG_TERM] == dict.fromkeys(expected, 0)


class Activity(MemorySource):
    """A source in which connections open and close between scrapes."""

    def open(self, made: Records, *, is_pre_existing: bool) -> None:
        self.chunks.append(made)
        added = self.counted.count(made).words
        if is_pre_existing:
            self.counted.record_pre_existing(added)
        else:
            self.counted.record_opened(added)

    def close_first(self) -> None:
        if self.chunks:
            closed = self.counted.count(self.chunks.pop(0)).words
            self.counted.record_closed(closed, NOW_NS)


some_openings = st.lists(
    st.tuples(
        st.sampled_from([22, 80, 443]),
        st.sampled_from([4, 6]),
        st.sampled_from([*Direction]),
        st.sampled_from([0, 0.999, 1.001, 5.999, 6, 59, 61, 999]),
        st.sampled_from([NETNS, 17]),
        st.booleans(),
    ),
    max_size=13,
)


@given(
    openings=some_openings,
    closings=st.lists(st.integers(0, 7), min_size=2, max_size=4),
    labels=some_labels,
    max_series=st.sampled_from([1, 3, 101]),
)
def test_identities_hold_for_any_labels(
    *,
    openings: list[tuple[int, int, Direction, float, int, bool]],
    closings: list[int],
    labels: tuple[str, ...],
    max_series: int,
) -> None:
    """No connection opens or closes during a scrape.

    Opened - closed = established - pre-existing. In every series, the count of lifetimes
    is the number of closed connections, and that of ages is the number of established
    ones. Long-term connections are those above the bound that equals the duration. No
    counter decreases.
    """
    source = Activity(parts=kernel_parts(BOTH, labels), bounds_s=BOUNDS_S)
    collected = collector_of(
        source,
        directions=BOTH,
        labels=labels,
        bounds_s=BOUNDS_S,
        max_series=max_series,
        names={} if "netns" in labels else None,
    )
    before: Page = {}
    for closed in closings:
        for port, version, direction, age_s, netns, is_pre_existing in openings:
            made = connections(port, 1, ip_version=version, age_s=age_s)
            made["is_outbound"] = direction
            made["key"]["netns"] = netns
            source.open(made, is_pre_existing=is_pre_existing)
        for _ in range(closed):
            source.close_first()
        page = scrape(collected)
        assert_identities(page)
        for name in (OPENED, CLOSED):
            assert sum(page.get(name, {}).values()) >= sum(before.get(name, {}).values())
        before = page


def assert_identities(page: Page) -> None:
    total = {name: sum(values.values()) for name, values in page.items()}
    if ESTABLISHED not in page:  # there is no series yet
        assert not total[PRE_EXISTING]
        return
    assert total[OPENED] - total[CLOSED] == total[ESTABLISHED] - total[PRE_EXISTING]
    series = page[ESTABLISHED].keys()
    assert page[OPENED].keys() == page[CLOSED].keys() == page[LONG_TERM].keys() == series
    for each in series:
        assert_histogram(page, f"{LIFETIMES}_bucket", each, page[CLOSED][each])
        assert_histogram(page, f"{AGES}_bucket", each, page[ESTABLISHED][each])
        younger = page[f"{AGES}_bucket"][*each, "6.0"]
        assert page[LONG_TERM][each] == page[ESTABLISHED][each] - younger
        assert page[f"{LIFETIMES}_count"][each] == page[CLOSED][each]
        assert page[f"{AGES}_gcount"][each] == page[ESTABLISHED][each]
    assert page[f"{LIFETIMES}_sum"].keys() == page[f"{AGES}_gsum"].keys() == series


def assert_histogram(page: Page, name: str, series: Labels, count: float) -> None:
    cumulative = [page[name][*series, le] for le in ("1.0", "6.0", "60.0", "+Inf")]
    assert cumulative == sorted(cumulative)
    assert cumulative[-1] == count


def test_a_histogram_has_each_connection_in_its_bucket() -> None:
    """The sums are the seconds of all lifetimes, and of all ages."""
    ages_s = (0.5, 3, 3, 30, 30, 30, 300, 300, 300, 300, 300)
    source = Activity(parts=kernel_parts(BOTH, ()), bounds_s=BOUNDS_S)
    collected = collector_of(source, labels=(), bounds_s=BOUNDS_S)
    for age_s in ages_s:
        source.open(connections(443, 1, age_s=age_s), is_pre_existing=False)
    expected = {("1.0",): 1, ("6.0",): 3, ("60.0",): 6, ("+Inf",): 11}
    nothing = dict.fromkeys(expected, 0)
    page = scrape(collected)
    assert page[f"{AGES}_bucket"] == expected
    assert page[f"{LIFETIMES}_bucket"] == nothing
    assert page[f"{AGES}_gsum"][()] == pytest.approx(sum(ages_s), abs=1e-3)
    for _ in ages_s:
        source.close_first()
    page = scrape(collected)
    assert page[f"{AGES}_bucket"] == nothing
    assert page[f"{LIFETIMES}_bucket"] == expected
    assert page[f"{LIFETIMES}_sum"][()] == pytest.approx(sum(ages_s), abs=1e-3)
    assert page[f"{AGES}_gsum"][()] == page[f"{LIFETIMES}_bucket"]["1.0",] - 1 == 0


def test_without_bounds_there_are_no_histograms() -> None:
    """They exist with --histograms only."""
    names = {each.name for each in collector_of(example(), directions=BOTH).collect()}
    assert not names & {LIFETIMES, AGES}


def test_counters_without_connections_have_a_series_from_the_first_scrape() -> None:
    """The state of the previous run may have counters of connections that are closed."""
    source = Activity(parts=kernel_parts(BOTH, ()))
    source.open(connections(443, 3), is_pre_existing=False)
    source.close_first()
    page = scrape(collector_of(source))
    assert page[ESTABLISHED] == {("443", "4"): 0}
    assert page[OPENED] == page[CLOSED] == {("443", "4"): 3}


def test_the_first_scrape_forgets_no_counters_of_named_ports() -> None:
    """--port has series before the first scrape, and --pin adopts counters.

    The source keeps the counters, and each scrape shows them.
    """
    source = Activity(parts=PER_NETNS)
    source.open(connections(443, 3), is_pre_existing=False)
    source.close_first()
    collected = collector_of(
        source, ports=[443], labels=("port", "netns"), names={NETNS: "self"}
    )
    for _ in range(2):
        page = scrape(collected)
        assert page[ESTABLISHED] == {("443", "self"): 0}
        assert page[OPENED] == page[CLOSED] == {("443", "self"): 3}
        source.counted.drop_forgotten(source.counted.count(connections(443, 0)).words)


def netns_of(page: Page, name: str) -> Mapping[Labels, float]:
    return {labels[2:]: value for labels, value in page[name].items()}


def per_netns(
    source: MemorySource, names: Mapping[int, str], now_ns: list[int]
) -> ConnectionCollector:
    labels = ("port", "tcp_version", "netns")
    selection = select((), tcpv6=True, directions=[Direction.INBOUND], labels=labels)
    return ConnectionCollector(
        source,
        Choice(selection, named((), NETNS, selection), DURATION_S),
        max_series=101,
        names=lambda: names,
        boottime_ns=lambda: now_ns[0],
    )


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_forgotten_namespace_does_not_reappear_with_its_counters(
    *, is_renamed: bool
) -> None:
    """It reappears neither before nor after the source forgets its counters.

    A new namespace with the same inode begins at 0.
    """
    source = Activity(parts=PER_NETNS)
    source.open(elsewhere(17, 443, 5), is_pre_existing=False)
    source.open(connections(443, 3), is_pre_existing=False)
    names, now_ns = {NETNS: "self", 17: "blue"}, [NOW_NS]
    collected = per_netns(source, names, now_ns)
    assert netns_of(scrape(collected), OPENED) == {("self",): 3, ("blue",): 5}
    source.close_first()
    assert netns_of(scrape(collected), CLOSED) == {("self",): 0, ("blue",): 5}
    del names[17]
    if is_renamed:
        names[17] = "green"
    else:
        scrape(collected)
        now_ns[0] += FORGET_NS + 1
    for _ in range(3):
        page = scrape(collected)
        assert netns_of(page, OPENED) == netns_of(page, ESTABLISHED) == {("self",): 3}
        assert page[PRE_EXISTING] == {(): 0}
    source.counted.drop_forgotten(source.counted.count(source.chunks[0]).words)
    assert netns_of(scrape(collected), OPENED) == {("self",): 3}
    source.open(elsewhere(17, 443, 2), is_pre_existing=False)
    page = scrape(collected)
    assert netns_of(page, OPENED) == {("self",): 3, ("green" if is_renamed else "17",): 2}
    assert not any(page[CLOSED].values())


def test_the_pre_existing_connections_are_a_metric() -> None:
    """Their number is established - (opened - closed), summed over all series."""
    page = scrape(collector_of(example()))
    assert page[PRE_EXISTING] == {(): 5}
    assert sum(page[OPENED].values()) == 7 + 3 + 2 + 11 + 13
    assert page[CLOSED]["443", "4"] == 11 + 13
    assert sum(page[ESTABLISHED].values()) == 7 + 5 + 3 + 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tcpexporter_uncertain_connections", 6),
        ("tcpexporter_kernel_series", 4),
        ("tcpexporter_max_kernel_series", 65536),
    ],
)
def test_numbers_of_the_kernel_exist_if_the_source_has_them(name: str, value: int) -> None:
    """A polling source has none of them."""
    assert scrape(collector_of(example()))[name] == {(): value}
    assert name not in scrape(collector_of(MemorySource()))


def test_large_counters_are_exact() -> None:
    """A counter is not limited to 32 bits."""
    source = MemorySource([connections(443, 1)])
    source.counted.count(source.chunks[0])
    source.counted._rows[-1, memory_ledger.OPENED] = 2**40 + 1
    assert scrape(collector_of(source))[OPENED] == {("443", "4"): 2**40 + 1}
    assert np.iinfo(source.ledger().opened.dtype).max == 2**63 - 1
