# SPDX-License-Identifier: GPL-3.0-only
"""Limits the number of series in an exposition, by adding up the smallest ones."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tcpexporter.connections.counting import Counts
from tcpexporter.connections.selection import Selection, folding_steps
from tcpexporter.connections.series import FOLDED, SERIES, SERIES_BYTES, Series
from tcpexporter.connections.sets import distinct, is_in


class _Given(NamedTuple):
    """What a layout depends on; `Folder.fold` describes each field."""

    series: Series
    listening: Series
    named: Series
    published: Series
    max_series: int
    selection: Selection


class _Layout(NamedTuple):
    """Which series an exposition has."""

    series: Series
    place: npt.NDArray[np.intp]
    """For each of the counted series, the index of the series that it is added to."""
    left_out: int
    """The number of series in use that are left out."""
    is_complete: bool = False
    """Whether no series is left out or folded. Then the layout does not depend on the
    numbers of connections."""


class Folder:
    """Limits the number of series in successive expositions.

    It keeps the layout while the arguments are the same arrays and no series is folded or
    left out.
    """

    def __init__(self) -> None:
        self._given: _Given | None = None
        self._layout = _Layout(np.empty(0, SERIES_BYTES), np.empty(0, np.intp), 0)

    def fold(
        self,
        counts: Counts,
        *,
        listening: Series,
        named: Series,
        published: Series,
        max_series: int,
        selection: Selection,
    ) -> tuple[Counts, int]:
        """Limit the number of series in an exposition.

        The connections of a series that is left out are added to a folded series, without
        port. There is one for each combination of the other labels, so the sums do not
        change. A series without a port is not folded by port: there is only one for each
        combination. If there are more than ``max_series`` of both kinds, the rest are added
        to series for all other owners, and then to series for all other namespaces.

        Args:
            counts: the counts of all series.
            listening: the series that have a listener now.
            named: the series that are never left out.
            published: the series of the previous exposition, including folded ones. A
                series that is not in use any more stays, at 0, while there is capacity. A
                folded series always stays.
            max_series: the maximum number of series that are not folded, unless more are
                named.
            selection: what the series were selected and projected by.

        Returns:
            The counts of the exposition, and the number of series in use that are left out.
        """
        given = _Given(counts.series, listening, named, published, max_series, selection)
        is_same = self._given is not None and all(map(operator.is_, given, self._given))
        if not (is_same and self._layout.is_complete):
            self._layout = _lay_out(counts, given)
            self._given = given
        return counts.moved(self._layout.series, self._layout.place), self._layout.left_out


def _lay_out(counts: Counts, given: _Given) -> _Layout:
    _, listening, named, published, max_series, selection = given
    steps = folding_steps(selection)
    limit = max(max_series, len(named)) if steps else np.iinfo(np.int64).max
    own = [_not_folded(each) for each in (counts.series, published)]
    everything = distinct(*own, listening, named)
    is_folded = published.view(SERIES)["flags"] & FOLDED != 0
    if len(everything) <= limit:
        kept = everything
        if len(own[0]) == len(counts.series) and not is_folded.any():
            # If they are equal, keep the array itself: the collector passes it again, and
            # `fold` compares arrays by identity.
            kept = published if np.array_equal(kept, published) else kept
            return _Layout(kept, np.searchsorted(kept, own[0]), 0, is_complete=True)
    else:
        kept = _kept(everything, counts, listening, own[1], named)[:limit]
    folded = np.setdiff1d(distinct(counts.series, listening), kept, assume_unique=True)
    others = _others(folded, published[is_folded], max_series, steps)
    exposed = distinct(kept, others)
    place = np.searchsorted(exposed, _found(counts.series, exposed, steps))
    left_out = np.setdiff1d(_not_folded(folded), exposed, assume_unique=True)
    return _Layout(exposed, place, len(left_out))


def _not_folded(series: Series) -> Series:
    chosen: Series = series[series.view(SERIES)["flags"] & FOLDED == 0]
    return chosen


def _kept(
    series: Series, counts: Counts, listening: Series, published: Series, named: Series
) -> Series:
    """Return the series in the order in which they are kept: most connections first.

    A listener counts as one connection, and is preferred among series of equal size.
    """
    rank = np.zeros(len(series), np.int64)
    counted = counts.series.view(SERIES)["flags"] & FOLDED == 0
    rank[np.searchsorted(series, counts.series[counted])] = (
        4 * counts.values.established[counted]
    )
    rank[np.searchsorted(series, listening)] += 4 + 2
    # This decides only between equals, so that series do not alternate between scrapes.
    rank[np.searchsorted(series, published)] += 1
    rank[np.searchsorted(series, named)] = np.iinfo(np.int64).max
    ordered: Series = series[np.argsort(-rank, kind="stable")]
    return ordered


def _others(
    folded: Series, published: Series, max_series: int, steps: Sequence[str]
) -> Series:
    """Return the published folded series, and those that ``folded`` are added to."""
    if not steps:
        return np.empty(0, SERIES_BYTES)
    needed = np.setdiff1d(
        distinct(_without(steps[0], folded)), published, assume_unique=True
    )
    others = np.concatenate((published, needed))
    for field in steps[1:]:
        is_shared = others.view(SERIES)[field] == 0
        own = others[~is_shared]
        shared = (others[is_shared], _without(field, own[max_series:]))
        others = distinct(own[:max_series], *shared)
    return distinct(others)


def _found(series: Series, exposed: Series, steps: Sequence[str]) -> Series:
    """Return the series of ``exposed`` that each of ``series`` is counted in.

    It is the series itself, or the first of these that is exposed: the series folded by
    port, then also by owner, then also by namespace.
    """
    found = series
    for field in steps:
        found = np.where(is_in(found, exposed), found, _without(field, found))
    return found


def _without(field: str, series: Series) -> Series:
    """Return ``series`` with a field set to 0, and with `FOLDED` where it was not 0."""
    blank = series.copy()
    fields = blank.view(SERIES)
    fields["flags"] |= np.where(fields[field] != 0, np.uint8(FOLDED), np.uint8(0))
    fields[field] = 0
    return blank
