# SPDX-License-Identifier: GPL-3.0-only
"""Parses Accept and Accept-Encoding, and chooses a format (RFC 9110, section 12.5).

No request is refused with 406. A client that accepts none of the formats gets the default
format, as from exporters written in Go.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# The quantifiers are possessive: they never backtrack, so the time is linear in the length
# of a header.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # noqa: S105
_PARAMETER = rf';[ \t]*+(?:({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*+"))?[ \t]*+'
_PREFERENCE = re.compile(rf"[ \t]*+({_TOKEN}(?:/{_TOKEN})?+)[ \t]*+((?:{_PARAMETER})*+)")
_PARAMETERS = re.compile(_PARAMETER)
_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*+"?+)++')
"""An element of a list; a comma between quotation marks does not end it."""
_WEIGHT = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?")

_IGNORED = "escaping"
"""A parameter that says how to escape special characters in metric names.

It is ignored, because the exporter's names have none."""


class Preference(NamedTuple):
    """One element of a header."""

    name: str
    """A content coding, or a media range as in ``text/plain`` or ``text/*``."""
    parameters: Mapping[str, str]
    weight: float
    """The weight, from 0 (not acceptable) to 1."""


def parse(header: str) -> list[Preference]:
    """Return the elements of a header in their order, in lower case.

    Elements that violate the grammar are left out.
    """
    found = (_preference(element) for element in _ELEMENT.findall(header))
    return [each for each in found if each]


def _preference(element: str) -> Preference | None:
    match = _PREFERENCE.fullmatch(element)
    if match is None:
        return None
    parameters = dict(_parameters(match[2]))
    weight = parameters.pop("q", "1")
    if not _WEIGHT.fullmatch(weight):
        return None
    return Preference(match[1].lower(), parameters, float(weight))


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    for name, value in _PARAMETERS.findall(text):
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])  # noqa: PLW2901
        if name:
            yield name.lower(), value.lower()


def prefers_gzip(accept_encoding: str) -> bool:
    """Return whether to compress a response with gzip; the alternative is no compression.

    An uncompressed response is acceptable unless the header excludes it. If gzip and no
    compression have the same weight, gzip is chosen only if the header names it.
    """
    weights: dict[str, float] = {}
    for coding, _, weight in parse(accept_encoding):
        name = coding.removeprefix("x-")  # x-gzip is gzip: RFC 9110, section 8.4.1.3
        weights[name] = max(weight, weights.get(name, 0))
    others = weights.get("*", 0)
    gzip, identity = weights.get("gzip", others), weights.get("identity", others)
    return gzip > identity or ("gzip" in weights and gzip == identity > 0)


def choose(accept: str, offers: Sequence[str]) -> int:
    """Return the index of the media type in ``offers`` that a client prefers.

    Among types of equal weight, a type that the header names precedes a type that only a
    wildcard matches. Among those, the type that the header names first precedes. If these
    are equal too, or if no type is acceptable, the result is 0.
    """
    preferences = parse(accept)
    merits = [_merit(parse(offer)[0], preferences) for offer in offers]
    return max(range(len(offers)), key=merits.__getitem__)


def _merit(offer: Preference, preferences: Sequence[Preference]) -> tuple[float, int, int]:
    """Return a sort key of an offer; the client prefers the offer with the largest key.

    It has the weight, the specificity of the name, and the negated position of the range
    that matches the offer. If several ranges match, it is the most specific one.
    """
    matching = [
        (*specificity, each.weight, -position)
        for position, each in enumerate(preferences)
        if (specificity := _specificity(each, offer))
    ]
    if not matching:
        return 0, 0, 0
    naming, _, weight, earliness = max(matching)
    return (weight, naming, earliness) if weight else (0, 0, 0)


def _specificity(accepted: Preference, offer: Preference) -> tuple[int, int] | None:
    """Return how specific a range is, by name and by parameters; larger is more specific.

    None: the range does not match the offer.
    """
    kind, _, _ = offer.name.partition("/")
    ranges = ("*/*", f"{kind}/*", offer.name)
    wanted = {each for each in accepted.parameters.items() if each[0] != _IGNORED}
    if accepted.name not in ranges or not wanted <= offer.parameters.items():
        return None
    return ranges.index(accepted.name), len(wanted)
