# SPDX-License-Identifier: GPL-3.0-only
"""Accept and Accept-Encoding: fixed headers, and random ones against another algorithm.

The kind of fault: a client gets a format that it has excluded, or not the format that it
prefers.
"""

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.metrics.exposition import OPENMETRICS, TEXT, Format, negotiate
from tcpexporter.metrics.negotiation import parse, prefers_gzip

OM = "application/openmetrics-text"

PROMETHEUS_2 = (
    f"{OM};version=1.0.0,{OM};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    f"{OM};version=1.0.0;escaping=allow-utf-8;q=0.6,{OM};version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,"
    "*/*;q=0.2"
)
PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;"
    f"encoding=delimited;q=0.7,{PROMETHEUS_3}"
)
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        # Headers of real clients
        ("", TEXT),
        ("*/*", TEXT),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, OPENMETRICS),
        (PROTOBUF, OPENMETRICS),
        (BROWSER, TEXT),
        ("text/html, image/gif, *; q=.2, */*; q=.2", TEXT),  # Java before 17
        # Weights
        (f"{OM};q=0.2, text/plain;q=0.5", TEXT),
        (f"{OM};q=0.5, text/plain;q=0.2", OPENMETRICS),
        (f"text/plain;q=0.2, {OM};q=0.5", OPENMETRICS),
        (f"{OM};q=0.001", OPENMETRICS),
        (f"{OM};q=0", TEXT),
        (f"{OM};q=0.000, */*", TEXT),
        ("text/plain;q=0, */*", OPENMETRICS),
        ("text/plain;q=0", TEXT),
        ("*/*;q=0", TEXT),
        (f"{OM};version=1.0.0;q=0, {OM}, text/plain;q=0.1", TEXT),
        # Ranges
        ("application/*", OPENMETRICS),
        ("text/*", TEXT),
        ("text/*;q=0.5, application/*", OPENMETRICS),
        ("application/*;q=0.5, text/*", TEXT),
        ("application/*, text/*", OPENMETRICS),
        ("text/*, application/*", TEXT),
        (f"*/*, {OM}", OPENMETRICS),
        (f"{OM};q=0, application/*, text/plain;q=0.1", TEXT),
        ("*/plain, application/*;q=0.1", OPENMETRICS),
        # Equal weights: the first one
        (f"{OM}, text/plain", OPENMETRICS),
        (f"text/plain, {OM}", TEXT),
        # Versions that the exporter supports
        (f"{OM};version=1.0.0", OPENMETRICS),
        (f"{OM};version=0.0.1", TEXT),
        (f"{OM};version=1.2.3", TEXT),
        (f"{OM};version=2.0.0, text/plain", TEXT),
        (f"{OM};version=x", TEXT),
        (f"{OM};version=", TEXT),
        (f"{OM};version=0.0.1,{OM};version=1.0.0;q=0.1", OPENMETRICS),
        (f"text/plain;version=1.0.0, {OM};q=0.1", OPENMETRICS),
        ("text/plain;version=0.0.4", TEXT),
        # Other parameters
        *((f"{OM};escaping={each}", OPENMETRICS) for each in ("allow-utf-8", "dots", "x")),
        (f"{OM};version=1.0.0;escaping=values;q=0.9, text/plain;q=0.8", OPENMETRICS),
        (f"{OM};charset=utf-8", OPENMETRICS),
        (f"{OM};charset=iso-8859-1", TEXT),
        (f"{OM};q=0.2;version=1.0.0, text/plain;q=0.1", OPENMETRICS),
        # Spelling
        ("APPLICATION/OpenMetrics-Text;VERSION=1.0.0;CharSet=UTF-8", OPENMETRICS),
        (f'{OM};version="1.0.0"', OPENMETRICS),
        (f'{OM};version="1.\\0.0"', OPENMETRICS),
        (f" \t{OM} ;\tversion=1.0.0 ; q=0.5 , text/plain; q=0.4 ", OPENMETRICS),
        (f",, ,{OM};;version=1.0.0; ,", OPENMETRICS),
        (f'text/x;a=",{OM},", text/plain', TEXT),
        # Elements that violate the grammar are ignored
        ("x", TEXT),
        (f"{OM};q=x", TEXT),
        (f"{OM};q=", TEXT),
        (f"{OM};q=1.1", TEXT),
        (f"{OM};q=-1", TEXT),
        (f"{OM};q=nan", TEXT),
        (f"{OM} version=1.0.0", TEXT),
        (f"{OM};version = 1.0.0", TEXT),
        (f'{OM};version="1.0.0', TEXT),
        (f'x", {OM}', TEXT),
        (f"text/plain;q=2, {OM};q=0.1", OPENMETRICS),
    ],
)
def test_the_format_with_the_largest_weight_is_chosen(accept: str, form: Format) -> None:
    """Only acceptable formats count; without any it is the text format."""
    assert negotiate(accept) is form


@pytest.mark.parametrize(
    ("accept_encoding", "gzip"),
    [
        ("", False),
        ("gzip", True),
        ("x-gzip", True),
        ("GZip", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("gzip, deflate, br, zstd", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0", False),
        ("gzip;Q=0", False),
        ("gzip ; q=0.000", False),
        ("gzip;q=0.001", True),
        ("identity", False),
        ("br", False),
        ("br, gzip;q=0.8", True),
        ("notgzip", False),
        # No compression
        ("identity, gzip", True),
        ("identity;q=0, gzip", True),
        ("identity;q=0, gzip;q=0.1", True),
        ("identity;q=0.5, gzip;q=0.1", False),
        ("identity;q=0.1, gzip;q=0.5", True),
        ("identity;q=0.5, gzip;q=0.5", True),
        # Wildcard
        ("*", False),
        ("*;q=0", False),
        ("*;q=0, gzip", True),
        ("*;q=0, identity", False),
        ("*, gzip;q=0", False),
        ("*, gzip;q=0.5", False),
        ("*;q=0.5, gzip", True),
        ("*, identity;q=0", True),
        ("*, identity;q=0.5", True),
        ("*;q=0.5, identity", False),
        # No coding is acceptable: the request is not refused
        ("identity;q=0", False),
        ("identity;q=0, br", False),
        ("identity;q=0, *;q=0", False),
        # Elements that violate the grammar are ignored
        ("gzip;q=2", False),
        ("gzip;q=", False),
        ("gzip q=1", False),
        ('"gzip"', False),
        ("gzip;q=2, *;q=0", False),
    ],
)
def test_gzip_is_chosen_if_it_is_preferred(accept_encoding: str, *, gzip: bool) -> None:
    """It must be acceptable, and preferred to no compression."""
    assert prefers_gzip(accept_encoding) == gzip


class Element(NamedTuple):
    """One element of a header and its spelling."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    thousandths: int | None
    spelling: tuple[bool, ...]
    """Write the element with capital letters, spaces, quotation marks, or the weight
    first."""

    def __str__(self) -> str:
        capitals, spaces, quoted, first = self.spelling
        name = self.name.upper() if capitals else self.name
        parts = [
            f'{key}="{value}"' if quoted else f"{key}={value}"
            for key, value in self.parameters
        ]
        if self.thousandths is not None:
            weight = f"q={self.thousandths / 1000:g}"
            parts.insert(0 if first else len(parts), weight)
        return (" ;\t" if spaces else ";").join((name, *parts))

    @property
    def weight(self) -> int:
        return 1000 if self.thousandths is None else self.thousandths


WEIGHTS = st.none() | st.sampled_from((0, 1, 500, 999, 1000)) | st.integers(0, 1000)
SPELLINGS = st.tuples(*[st.booleans()] * 4)

PARAMETERS = st.lists(
    st.sampled_from(
        (
            *(("version", each) for each in ("0.0.1", "0.0.4", "1.0.0", "1.2.3")),
            *(("charset", each) for each in ("utf-8", "ascii")),
            *(("escaping", each) for each in ("dots", "values")),
        )
    ),
    unique_by=lambda each: each[0],
    max_size=3,
).map(tuple)

RANGES = st.builds(
    Element,
    st.sampled_from((OM, "text/plain", "application/*", "text/*", "*/*", "text/html")),
    PARAMETERS,
    WEIGHTS,
    SPELLINGS,
)

CODINGS = st.builds(
    Element,
    st.sampled_from(("gzip", "x-gzip", "identity", "*", "br")),
    st.just(()),
    WEIGHTS,
    SPELLINGS,
)

OURS = (
    (TEXT, {"text/plain": 2, "text/*": 1, "*/*": 0}, {"0.0.4", "utf-8"}),
    (OPENMETRICS, {OM: 2, "application/*": 1, "*/*": 0}, {"1.0.0", "utf-8"}),
)


def format_by_elimination(elements: list[Element]) -> Format:
    """Choose by elimination, with another algorithm than the code under test."""
    left: list[tuple[Format, Element, int]] = []
    for form, names, values in OURS:
        admitting = [
            each
            for each in elements
            if each.name in names
            and all(value in values for key, value in each.parameters if key != "escaping")
        ]
        if not admitting:
            continue
        exactest = max(names[each.name] for each in admitting)
        admitting = [each for each in admitting if names[each.name] == exactest]
        longest = max(
            len(dict(each.parameters).keys() - {"escaping"}) for each in admitting
        )
        admitting = [
            each
            for each in admitting
            if len(dict(each.parameters).keys() - {"escaping"}) == longest
        ]
        # the first of equal formats
        decisive = max(admitting, key=lambda each: each.weight)
        if decisive.weight:
            left.append((form, decisive, exactest))
    if len(left) < 2:
        return left[0][0] if left else TEXT
    (_, text, text_named), (_, openmetrics, openmetrics_named) = left
    for ours, theirs in (
        (openmetrics.weight, text.weight),
        (openmetrics_named, text_named),
    ):
        if ours != theirs:
            return OPENMETRICS if ours > theirs else TEXT
    positions = [
        next(i for i, each in enumerate(elements) if each is one)
        for one in (openmetrics, text)
    ]
    return OPENMETRICS if positions[0] < positions[1] else TEXT


@given(st.lists(RANGES, max_size=5))
def test_any_accept_header_gives_the_reference_choice(elements: list[Element]) -> None:
    """Weights, ranges, parameters and spelling are random."""
    assert negotiate(",".join(map(str, elements))) is format_by_elimination(elements)


@given(st.lists(CODINGS, max_size=5))
def test_any_accept_encoding_header_gives_the_reference_choice(
    elements: list[Element],
) -> None:
    """The reference is a table of the weight of each coding."""

    def worth(*names: str) -> int | None:
        weights = [each.weight for each in elements if each.name in names]
        return max(weights) if weights else None

    named, star, plain = worth("gzip", "x-gzip"), worth("*"), worth("identity")
    compressed = named if named is not None else star or 0
    uncompressed = plain if plain is not None else star or 0
    expected = compressed > 0 and (
        compressed > uncompressed or (compressed == uncompressed and named is not None)
    )
    assert prefers_gzip(", ".join(map(str, elements))) == expected


@given(st.text(st.sampled_from('aq/*;=,." \t\\01\xe9')) | st.text(max_size=50))
def test_any_text_is_parsed(header: str) -> None:
    """There is no error, and weights are from 0 to 1."""
    assert all(0 <= each.weight <= 1 for each in parse(header))
    assert negotiate(header) in (TEXT, OPENMETRICS)
    assert prefers_gzip(header) in (True, False)


@pytest.mark.parametrize(
    "repeated", ['"', '"\\', ";", "; ", " ", ",", "a;a=a", "a=", "/", '";"']
)
def test_a_long_header_is_parsed_fast(repeated: str) -> None:
    """No pattern backtracks: 2 ** 17 bytes are parsed within the time limit of the test.

    In quadratic time each header would require minutes.
    """
    for before, after in itertools.product(("", "a;a="), ("", "\x7f")):
        parse(before + repeated * ((1 << 17) // len(repeated)) + after)
