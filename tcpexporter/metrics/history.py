# SPDX-License-Identifier: GPL-3.0-only
"""Keeps samples of each series for the last 15 minutes, in rings of numpy arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tcpexporter.metrics.series_family import LabelSets
from tcpexporter.metrics.series_labels import Labels

INTERVAL_S = 5
"""Time slot of a sample: at most one sample is kept per slot."""

SPAN_S = 900
"""For how long samples are kept."""

RATE_S = 60
"""Time over which rates are measured: at most the last minute."""

MAX_SERIES = 2_000
"""Maximum number of series in the history. Its arrays then use 1.7 MB."""

POINTS = 60
"""Points of a sparkline. Each point is the largest of the samples in 15 s."""

LEVELS = "0123456789abcdef"
"""The digits of a point: its number in fifteenths of the series' largest, rounded up."""

UNKNOWN = "-"
"""A point without a number: before the first sample, or of a series past `MAX_SERIES`."""

_SAMPLES = SPAN_S // INTERVAL_S
_RATES = RATE_S // INTERVAL_S + 1
_NEVER = -(10**9)

Numbers = npt.NDArray[np.uint32]


class Past(NamedTuple):
    """The history of some series; each list has one element for each of them."""

    levels: list[str]
    """`POINTS` characters, each from `LEVELS` or `UNKNOWN`, the oldest first."""
    largest: list[int]
    """The number of connections at the level ``f``."""


class Rates(NamedTuple):
    """Connections per minute; each list has one element for each series."""

    opened: list[float]
    closed: list[float]


class History:
    """Rings of samples: in each array a sample is a row, and a series is a column."""

    def __init__(self) -> None:
        """Start without samples."""
        self._columns: dict[Labels, int] = {}
        self._labels: LabelSets | None = None
        self._of_labels = np.zeros(0, np.intp)
        self._established = np.zeros((_SAMPLES, 0), np.uint32)
        self._opened = np.zeros((_RATES, 0), np.uint32)
        self._closed = np.zeros((_RATES, 0), np.uint32)
        self._slots = np.full(_SAMPLES, _NEVER)
        self._times_s = np.zeros(_RATES)
        self._rate_slots = np.full(_RATES, _NEVER)

    @property
    def nbytes(self) -> int:
        """The size of the arrays, in bytes."""
        return self._established.nbytes + self._opened.nbytes + self._closed.nbytes

    def is_due(self, now_s: float) -> bool:
        """Return whether no sample is kept yet for the interval of this time."""
        return int(now_s // INTERVAL_S) not in self._slots

    def add(
        self,
        now_s: float,
        labels: LabelSets,
        established: Sequence[int],
        opened: Sequence[int],
        closed: Sequence[int],
    ) -> None:
        """Store a sample in place of the oldest one.

        Args:
            now_s: the time on a clock that never jumps, in seconds.
            labels: the series.
            established: for each series, the number of established connections.
            opened: for each series, the counter of opened connections.
            closed: for each series, the counter of closed connections.
        """
        columns = self._columns_of(labels, established)
        has_column = columns >= 0
        kept = columns[has_column]
        slot = int(now_s // INTERVAL_S)
        row, rate_row = slot % _SAMPLES, slot % _RATES
        self._slots[row] = self._rate_slots[rate_row] = slot
        self._times_s[rate_row] = now_s
        for array, at, numbers in (
            (self._established, row, established),
            (self._opened, rate_row, opened),
            (self._closed, rate_row, closed),
        ):
            array[at] = 0
            # Counters are stored modulo 2**32: their change in a minute is below 2**31.
            array[at, kept] = np.array(numbers, np.int64)[has_column].astype(np.uint32)

    def rates(
        self,
        now_s: float,
        labels: LabelSets,
        established: Sequence[int],
        opened: Sequence[int],
        closed: Sequence[int],
    ) -> Rates:
        """Return the mean rates since the oldest sample of the last minute.

        The arguments are those of `add`. Without a sample that is at least 1 s old, all
        rates are 0. A series that the sample lacks had counters of 0 then.
        """
        slots = self._rate_slots
        oldest = int(now_s // INTERVAL_S) - _RATES + 1
        usable = np.flatnonzero((slots >= oldest) & (now_s - self._times_s >= 1))
        if not len(usable):
            return Rates([0.0] * len(opened), [0.0] * len(closed))
        row = usable[np.argmin(slots[usable])]
        columns = self._columns_of(labels, established)
        minutes = (now_s - self._times_s[row]) / 60

        def rate(counter: Sequence[int], before: Numbers) -> list[float]:
            now = np.array(counter, np.int64).astype(np.uint32)
            change = (now - before[row, columns]).view(np.int32)
            # A counter can fall only when series are folded.
            change = np.where((columns >= 0) & (change > 0), change, 0)
            return np.round(change / minutes, 1).tolist()  # type: ignore[no-any-return]

        if not self._columns:
            return Rates([0.0] * len(opened), [0.0] * len(closed))
        return Rates(rate(opened, self._opened), rate(closed, self._closed))

    def restart_rates(self) -> None:
        """Calculate rates from the next sample on: a new series may have old counters."""
        self._rate_slots[:] = _NEVER

    def past(self, now_s: float, chosen: Sequence[int]) -> Past:
        """Return the last 15 minutes of some series.

        Args:
            now_s: the time on the clock of `add`, in seconds.
            chosen: the positions of the series in the labels that were last added.
        """
        slot = int(now_s // INTERVAL_S)
        wanted = np.arange(slot - _SAMPLES + 1, slot + 1)
        order = np.argsort(self._slots)
        # A slot without a sample has the numbers of the sample before it.
        at = np.searchsorted(self._slots[order], wanted, side="right") - 1
        known = (at >= 0) & (self._slots[order][at] > slot - 2 * _SAMPLES)
        columns = self._of_labels[np.array(chosen, np.intp)]
        points = self._established[:, columns][order[at]]
        points[~known] = 0
        points = points.reshape(POINTS, _SAMPLES // POINTS, len(columns)).max(axis=1)
        largest = points.max(axis=0, initial=0)
        # With integers, because rounding up a float can exceed the highest level.
        highest, divisor = len(LEVELS) - 1, np.maximum(largest, 1)
        levels = (points.astype(np.int64) * highest + (divisor - 1)) // divisor
        letters = np.frombuffer(LEVELS.encode(), np.uint8)[levels]
        letters[~known.reshape(POINTS, -1).any(axis=1)] = ord(UNKNOWN)
        letters[:, columns < 0] = ord(UNKNOWN)
        text = np.ascontiguousarray(letters.T).tobytes().decode()
        starts = range(0, len(text), POINTS)
        return Past([text[each : each + POINTS] for each in starts], largest.tolist())

    def _columns_of(
        self, labels: LabelSets, established: Sequence[int]
    ) -> npt.NDArray[np.intp]:
        """Return the column of each series; allocate columns to new series.

        A series has -1 if no column is free.
        """
        if labels is self._labels:  # the collector reuses the object while series are equal
            return self._of_labels
        missing = [each for each, row in enumerate(labels.rows) if row not in self._columns]
        if missing:
            self._free_columns(labels)
            missing.sort(key=established.__getitem__, reverse=True)
            self._allocate([labels.rows[each] for each in missing])
        find = self._columns.get
        self._of_labels = np.array([find(row, -1) for row in labels.rows], np.intp)
        self._labels = labels
        return self._of_labels

    def _free_columns(self, labels: LabelSets) -> None:
        """Free the columns of series that the exposition no longer has."""
        for row in self._columns.keys() - {*labels.rows}:
            column = self._columns.pop(row)
            for array in (self._established, self._opened, self._closed):
                array[:, column] = 0

    def _allocate(self, rows: Sequence[Labels]) -> None:
        wanted = min(MAX_SERIES, len(self._columns) + len(rows))
        if (more := wanted - self._established.shape[1]) > 0:
            self._established, self._opened, self._closed = (
                np.pad(array, ((0, 0), (0, more)))
                for array in (self._established, self._opened, self._closed)
            )
        used = {*self._columns.values()}
        free = [each for each in range(self._established.shape[1]) if each not in used]
        self._columns.update(zip(rows, free, strict=False))
