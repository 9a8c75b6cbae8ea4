# SPDX-License-Identifier: GPL-3.0-only
"""Families that are written fast have the same text as those of the library."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics.exposition import (
    generate_latest as generate_openmetrics,
)
from prometheus_client.registry import Collector

from tcpexporter.metrics.exposition import (
    KEPT_SAMPLES,
    OPENMETRICS,
    TEXT,
    Exposition,
    Format,
    Texts,
)
from tcpexporter.metrics.series_family import (
    PLAIN_BELOW,
    LabelSets,
    SeriesFamily,
    WrittenFamily,
    written,
)

HELP = 'Number of "connections" \\ in each series.'


class Only(Collector):
    """Collects one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


def by_library(kind: str, labels: LabelSets, numbers: Sequence[float]) -> Metric:
    make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    family = make("connections", HELP, labels=labels.names)
    for row, number in zip(labels.rows, numbers, strict=True):
        family.add_metric(row, number)
    return family


some_numbers = (
    st.integers(0, 7)
    | st.integers(0, 2**63 - 1)
    | st.integers(PLAIN_BELOW - 2, PLAIN_BELOW + 2)
)
some_values = st.text(st.characters(codec="utf-8"), max_size=7) | st.sampled_from(
    ["", "443", "other", 'say "yes"', "a\\b", "a\nb", "\\n", '\\"']
)


@given(
    kind=st.sampled_from(["counter", "gauge"]),
    names=st.sampled_from([(), ("port",), ("tcp_version", "port"), ("port", "netns", "a")]),
    data=st.data(),
    numbers=st.lists(some_numbers, max_size=5),
)
def test_a_family_is_written_as_by_the_library(
    kind: str, names: tuple[str, ...], data: st.DataObject, numbers: list[int]
) -> None:
    """This holds for any label values and numbers, in both formats."""
    rows = data.draw(
        st.lists(
            st.tuples(*[some_values] * len(names)),
            min_size=len(numbers),
            max_size=len(numbers),
        )
    )
    labels = LabelSets(names, rows)
    ours = SeriesFamily("connections", HELP, kind, labels, numbers)
    theirs = by_library(kind, labels, numbers)
    registry = CollectorRegistry()
    registry.register(Only(theirs))
    assert Exposition([ours]).body(TEXT) == generate_latest(registry)
    openmetrics = generate_openmetrics(registry)  # type: ignore[no-untyped-call]
    assert Exposition([ours]).body(OPENMETRICS) == openmetrics
    assert ours.samples == theirs.samples


@pytest.mark.parametrize("number", [0, 999_999, 1_000_000, 2**53, 2**63 - 1])
def test_a_number_is_written_as_by_go(number: int) -> None:
    """From a million on it has an exponent."""
    labels = LabelSets((), [()])
    family = SeriesFamily("connections", HELP, "gauge", labels, [number])
    (line,) = family.sample_lines().decode().splitlines()
    name, text = line.split(" ")
    assert name == "connections"
    assert float(text) == float(number)
    assert ("e" in text) == (number >= PLAIN_BELOW)


def test_labels_are_written_once() -> None:
    """The text is kept for the families and scrapes that share it."""
    labels = LabelSets(("port",), [("443",)])
    assert labels.texts is labels.texts
    assert labels.texts == ['{port="443"} ']


@given(
    number=st.floats() | some_numbers,
    labels=st.dictionaries(st.sampled_from(["a", "by", "c"]), some_values),
    kind=st.sampled_from(["counter", "gauge", "info"]),
)
def test_a_family_with_one_sample_is_written_as_by_the_library(
    number: float, labels: dict[str, str], kind: str
) -> None:
    """This holds for fractions, infinity and NaN, and for families of type info."""
    if kind == "info":
        family: Metric = InfoMetricFamily("about", HELP, labels)
    else:
        family = by_library(
            kind, LabelSets(tuple(labels), [tuple(labels.values())]), [number]
        )
    assert isinstance(written(family), WrittenFamily)
    exposition = Exposition([family])
    assert exposition.body(TEXT) == generate_latest(Only(family))
    openmetrics = generate_openmetrics(Only(family))  # type: ignore[no-untyped-call]
    assert exposition.body(OPENMETRICS) == openmetrics


def test_families_that_the_library_writes_differently_are_left_to_it() -> None:
    """These are histograms, samples with a timestamp or exemplar, and other names."""
    histogram = HistogramMetricFamily("h", HELP, buckets=[("+Inf", 3.0)], sum_value=7.0)
    dated, created = GaugeMetricFamily("g", HELP), CounterMetricFamily("c", HELP)
    dated.add_metric([], 3, timestamp=7)
    created.add_sample("c_created", {}, 3)
    for family in (histogram, dated, created, GaugeMetricFamily("empty", HELP)):
        assert written(family) is family
        assert Exposition([family]).body(TEXT) == generate_latest(Only(family))


some_states = st.lists(
    st.tuples(
        st.sampled_from([("port",), ("netns",)]),
        st.dictionaries(st.sampled_from(["443", "8080"]), st.sampled_from([0, 1, 7])),
        st.sampled_from([TEXT, OPENMETRICS]),
    ),
    max_size=7,
)


@given(some_states)
def test_an_exposition_after_others_is_written_as_the_first_one(
    states: list[tuple[tuple[str], dict[str, int], Format]],
) -> None:
    """This holds for any changes of labels and numbers, and for any order of formats."""
    texts: dict[Format, Texts] = {}
    for names, numbers, form in states:
        labels = LabelSets(names, [(each,) for each in numbers])
        family = SeriesFamily("connections", HELP, "gauge", labels, [*numbers.values()])
        exposition = Exposition([family], texts)
        assert exposition.body(form) == Exposition([family]).body(form)


def test_a_family_is_written_again_only_after_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of seven collections, the third one has another number, the fifth another label."""
    collections = [(7, "443")] * 2 + [(5, "443")] * 2 + [(5, "80")] * 3
    writings: list[Sequence[float]] = []
    sample_lines = SeriesFamily.sample_lines

    def spy(family: SeriesFamily) -> bytes:
        writings.append(family.numbers)
        return sample_lines(family)

    monkeypatch.setattr(SeriesFamily, "sample_lines", spy)
    texts: dict[Format, Texts] = {}
    for number, port in collections:
        labels = LabelSets(("port",), [(port,)])
        family = SeriesFamily("connections", HELP, "gauge", labels, [number])
        Exposition([family], texts).body(TEXT)
    assert writings == [[7], [5], [5]]


def test_texts_of_large_families_and_of_earlier_expositions_are_not_kept() -> None:
    """Otherwise the process would use more memory until it ends."""
    few = LabelSets(("port",), [("443",)])
    many = LabelSets(("port",), [(str(port),) for port in range(KEPT_SAMPLES + 1)])
    texts: dict[Format, Texts] = {}
    for name, labels in (("first", few), ("second", few), ("third", many)):
        numbers = [7] * len(labels.rows)
        family = SeriesFamily(name, HELP, "gauge", labels, numbers)
        Exposition([family], texts).body(TEXT)
        assert [*texts[TEXT]] == ([name] if labels is few else [])


@pytest.mark.parametrize(("text", "kind"), [("Other.", "gauge"), (HELP, "counter")])
def test_a_family_with_another_head_is_written_again(text: str, kind: str) -> None:
    """Only its help or its type has changed."""
    texts: dict[Format, Texts] = {}
    labels = LabelSets(("port",), [("443",)])
    for family in (
        SeriesFamily("connections", HELP, "gauge", labels, [7]),
        SeriesFamily("connections", text, kind, labels, [7]),
    ):
        written_now = Exposition([family], texts).body(TEXT)
        assert written_now == Exposition([family]).body(TEXT)
