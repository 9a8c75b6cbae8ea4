# SPDX-License-Identifier: GPL-3.0-only
"""Metric families that are written faster than by prometheus_client.

That library needs 4 us to make and write a sample. It formats the labels at each scrape,
although they do not change. A collector keeps `LabelSets`, which keeps the formatted text.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from prometheus_client import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from tcpexporter.metrics.series_labels import Labels

PLAIN_BELOW = 1_000_000
"""From this number on, Go, and so the library, writes numbers with an exponent."""

SUFFIXES = {"counter": "_total", "gauge": "", "info": "_info"}


class LabelSets:
    """The labels of each series."""

    def __init__(self, names: Sequence[str], rows: Sequence[Labels]) -> None:
        """Use these names, and the values of each series in the same order."""
        self.names = names
        self.rows = rows

    @cached_property
    def texts(self) -> list[str]:
        """The labels of each series as they are written in an exposition."""
        if not self.names:
            return [" "] * len(self.rows)
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        pairs = (
            [f'{self.names[at]}="{_escaped(row[at])}"' for at in order] for row in self.rows
        )
        return ["{" + ",".join(each) + "} " for each in pairs]


class WrittenFamily(Metric):
    """A metric family that writes its samples itself."""

    numbers: Sequence[float]
    """The value of each sample."""

    def __init__(
        self,
        name: str,
        documentation: str,
        typ: str,
        labels: LabelSets,
        numbers: Sequence[float],
    ) -> None:
        """Make the family; the ``name`` has no ``_total`` or ``_info``."""
        self.numbers = numbers
        self.labels = labels
        super().__init__(name, documentation, typ)

    @property
    def sample_name(self) -> str:
        """The name of all samples."""
        return self.name + SUFFIXES[self.type]

    @property
    def samples(self) -> list[Sample]:
        """The samples as objects of the library."""
        return [
            Sample(self.sample_name, dict(zip(self.labels.names, row, strict=True)), number)
            for row, number in zip(self.labels.rows, self.numbers, strict=True)
        ]

    @samples.setter
    def samples(self, _: list[Sample]) -> None:
        """Ignore the empty list with which the library initializes them."""

    def sample_lines(self) -> bytes:
        """Return all samples as they are written in every text format."""
        name = self.sample_name
        pairs = zip(self.labels.texts, self.numbers, strict=True)
        lines = [f"{name}{text}{_go_string(number)}\n" for text, number in pairs]
        return "".join(lines).encode()

    def is_written_as(self, other: "WrittenFamily") -> bool:
        """Return whether the text of another family of this name is the same."""
        labels, others = self.labels, other.labels
        return (
            self.numbers == other.numbers
            and (self.type, self.documentation) == (other.type, other.documentation)
            and (
                labels is others
                or (labels.names, labels.rows) == (others.names, others.rows)
            )
        )


class SeriesFamily(WrittenFamily):
    """A gauge or counter that has a whole number for each series."""

    numbers: Sequence[int]

    def sample_lines(self) -> bytes:
        """Do as `WrittenFamily.sample_lines` three times as fast."""
        name = self.sample_name
        return "".join(
            [
                f"{name}{text}{number}.0\n"
                if number < PLAIN_BELOW
                else f"{name}{text}{_go_string(number)}\n"
                for text, number in zip(self.labels.texts, self.numbers, strict=True)
            ]
        ).encode()


NO_LABELS = LabelSets((), [()])


def single_family(name: str, documentation: str, typ: str, number: float) -> WrittenFamily:
    """Return a family with one sample, without labels."""
    return WrittenFamily(name, documentation, typ, NO_LABELS, (number,))


def info_family(name: str, documentation: str, labels: Mapping[str, str]) -> WrittenFamily:
    """Return a family of type info, whose ``name`` has no ``_info``."""
    row = LabelSets(tuple(labels), [tuple(labels.values())])
    return WrittenFamily(name, documentation, "info", row, (1,))


def labelled_family(
    name: str, documentation: str, typ: str, label: str, values: Mapping[str, int]
) -> WrittenFamily:
    """Return a family with one label; ``values`` maps label values to samples."""
    labels = LabelSets((label,), [(each,) for each in values])
    return WrittenFamily(name, documentation, typ, labels, [*values.values()])


def written(family: Metric) -> Metric:
    """Return a family with one sample as a `WrittenFamily`; return any other unchanged."""
    if isinstance(family, WrittenFamily) or family.type not in SUFFIXES:
        return family
    if len(family.samples) != 1:
        return family
    ((name, labels, number, timestamp, exemplar, *_),) = family.samples
    if name != family.name + SUFFIXES[family.type] or timestamp or exemplar:
        return family
    row = LabelSets(tuple(labels), [tuple(labels.values())])
    return WrittenFamily(family.name, family.documentation, family.type, row, (number,))


def _go_string(number: float) -> str:
    text: str = floatToGoString(number)  # type: ignore[no-untyped-call]
    return text


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
