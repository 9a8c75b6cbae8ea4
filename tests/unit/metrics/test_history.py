# SPDX-License-Identifier: GPL-3.0-only
"""The last 15 minutes of each series: levels, rates, and the limit of memory."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpexporter.metrics.history import (
    INTERVAL_S,
    MAX_SERIES,
    POINTS,
    SPAN_S,
    UNKNOWN,
    History,
)
from tcpexporter.metrics.series_family import LabelSets

BEGIN_S = 1_000_003.0


def label_sets(*names: str) -> LabelSets:
    return LabelSets(("port",), [(each,) for each in names])


def test_a_sparkline_is_unknown_before_the_first_sample() -> None:
    """Each point is the largest number in 15 s, in fifteenths of the largest point."""
    history, labels = History(), label_sets("443")
    now_s = BEGIN_S
    for number in (15, 30, 7):
        history.add(now_s, labels, [number], [0], [0])
        now_s += 15
    # The last 15 s began with the sample of 30.
    past = history.past(now_s - 15, [0])
    assert past.largest == [30]
    assert past.levels[0][-3:] == "8ff"
    assert past.levels[0][:-3] == UNKNOWN * (POINTS - 3)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=97))
@example([3, 7, 13, 21, 26, 27, 41, 42, 49, 52, 54, 55, 1_000_003])
def test_the_largest_number_of_any_series_has_the_highest_level(numbers: list[int]) -> None:
    """A level is rounded up: only 0 has the level 0."""
    history = History()
    labels = label_sets(*map(str, range(len(numbers))))
    zeros = [0] * len(numbers)
    history.add(BEGIN_S - 15, labels, [number // 3 for number in numbers], zeros, zeros)
    history.add(BEGIN_S, labels, numbers, zeros, zeros)
    past = history.past(BEGIN_S, range(len(numbers)))
    for number, levels in zip(numbers, past.levels, strict=True):
        third = 0 if number < 3 else -(-(number // 3) * 15 // number)
        assert levels[-2:] == f"{third:x}" + ("f" if number else "0")


def test_samples_of_more_than_15_minutes_ago_are_forgotten() -> None:
    """Later samples have replaced them in the ring."""
    history, labels = History(), label_sets("443")
    for at in range(0, 2 * SPAN_S, INTERVAL_S):
        number = 100 if at < SPAN_S - INTERVAL_S else 3
        history.add(BEGIN_S + at, labels, [number], [0], [0])
    past = history.past(BEGIN_S + 2 * SPAN_S - INTERVAL_S, [0])
    assert past.largest == [3]
    assert past.levels == ["f" * POINTS]


def test_a_point_without_a_sample_repeats_the_sample_before_it() -> None:
    """With many connections, samples are further apart than points."""
    history, labels = History(), label_sets("443")
    history.add(BEGIN_S, labels, [5], [0], [0])
    history.add(BEGIN_S + 120, labels, [5], [0], [0])
    assert history.past(BEGIN_S + 120, [0]).levels[0][-8:] == "f" * 8


def test_rates_are_those_of_the_last_minute() -> None:
    """A counter that falls, because a series was folded, has the rate 0."""
    history, labels = History(), label_sets("443", "80")
    for at in range(0, 121, INTERVAL_S):
        history.add(BEGIN_S + at, labels, [0, 0], [at * 2, 1000 - at], [at, 7])
    now_s = BEGIN_S + 121
    rates = history.rates(now_s, labels, [0, 0], [242, 879], [121, 7])
    assert rates.opened == [pytest.approx(120, abs=3), 0]
    assert rates.closed == [pytest.approx(60, abs=3), 0]


def test_rates_before_the_first_sample_are_0() -> None:
    """A series that has just appeared does not disturb the rates of other series."""
    history = History()
    assert history.rates(BEGIN_S, label_sets("443"), [1], [1], [1]).opened == [0]
    history.add(BEGIN_S, label_sets("443"), [1], [1], [1])
    both = label_sets("443", "80")
    rates = history.rates(BEGIN_S + 10, both, [1, 1], [3, 900], [1, 1])
    assert rates.opened[0] > 0


def test_rates_restart_when_a_series_may_have_an_old_counter() -> None:
    """A reload selects port 80, where 900 connections were opened before."""
    history = History()
    history.add(BEGIN_S, label_sets("443"), [1], [1], [1])
    history.restart_rates()
    both = label_sets("443", "80")
    now = [1, 1], [3, 900], [1, 1]
    assert history.rates(BEGIN_S + 10, both, *now).opened == [0, 0]
    history.add(BEGIN_S + 10, both, *now)
    later = [1, 1], [3, 907], [1, 1]
    assert history.rates(BEGIN_S + 20, both, *later).opened == [0, 42]


def test_the_arrays_have_less_than_2_mib_with_all_series() -> None:
    """The history keeps the series with most connections, up to the limit."""
    history = History()
    names = [str(each) for each in range(MAX_SERIES + 101)]
    numbers = [*range(len(names))]
    history.add(BEGIN_S, label_sets(*names), numbers, numbers, numbers)
    assert history.nbytes < 2 << 20
    past = history.past(BEGIN_S, [0, len(names) - 1])
    assert past.levels[0] == UNKNOWN * POINTS
    assert past.levels[1][-1] == "f"


def test_the_column_of_a_removed_series_is_reused() -> None:
    """Another series gets the column, without the numbers of the removed one."""
    history = History()
    first = [f"a{each}" for each in range(MAX_SERIES)]
    history.add(
        BEGIN_S, label_sets(*first), [9] * MAX_SERIES, [0] * MAX_SERIES, [0] * MAX_SERIES
    )
    second = [f"b{each}" for each in range(MAX_SERIES)]
    now_s = BEGIN_S + INTERVAL_S
    history.add(
        now_s, label_sets(*second), [3] * MAX_SERIES, [0] * MAX_SERIES, [0] * MAX_SERIES
    )
    assert history.past(now_s, [0]).largest == [3]


def test_there_may_be_no_series_at_all() -> None:
    """An exporter without listeners and connections has none."""
    history, none = History(), label_sets()
    history.add(BEGIN_S, none, [], [], [])
    assert history.rates(BEGIN_S + 5, none, [], [], []).opened == []
    assert history.past(BEGIN_S, []).levels == []
