# SPDX-License-Identifier: GPL-3.0-only
"""What a client prefers: Accept and Accept-Encoding as RFC 9110, section 12.5 has them.

Nothing is refused with 406. If nothing that we have is acceptable, the client gets what it
would get without the header, as from the exporters that are written in Go.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# Every quantifier whose end is not certain is possessive: no header makes these search for
# longer than it is long.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # noqa: S105
_PARAMETER = rf';[ \t]*+(?:({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*+"))?[ \t]*+'
_PREFERENCE = re.compile(rf"[ \t]*+({_TOKEN}(?:/{_TOKEN})?+)[ \t]*+((?:{_PARAMETER})*+)")
_PARAMETERS = re.compile(_PARAMETER)
_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*+"?+)++')
"""Of a list; a comma between quotation marks does not end it."""
_WEIGHT = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?")

_WITHOUT_MEANING = "escaping"
"""How a client wants names written that need it; no metric of ours has one."""


class Preference(NamedTuple):
    """One element of a header."""

    name: str
    """A content coding, or a media range as in ``text/plain`` or ``text/*``."""
    parameters: Mapping[str, str]
    weight: float
    """From 0, which is not acceptable, to 1."""


def parse(header: str) -> list[Preference]:
    """The elements of a header in their order, in lower case.

    An element that does not follow the grammar is left out.
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
    """Whether a response should be compressed with gzip; otherwise it is not compressed.

    Not compressing is always acceptable unless a client excludes it; between equal weights
    gzip is preferred only if it is named.
    """
    weights: dict[str, float] = {}
    for coding, _, weight in parse(accept_encoding):
        name = coding.removeprefix("x-")  # x-gzip is gzip: RFC 9110, section 8.4.1.3
        weights[name] = max(weight, weights.get(name, 0))
    others = weights.get("*", 0)
    gzip, identity = weights.get("gzip", others), weights.get("identity", others)
    return gzip > identity or ("gzip" in weights and gzip == identity > 0)


def choose(accept: str, offers: Sequence[str]) -> int:
    """The index of the media type that a client prefers among those that we have.

    Between equal weights, what a client names comes before what a wildcard admits, then
    what it names first. Between equals, or without an acceptable one, it is the first.
    """
    preferences = parse(accept)
    merits = [_merit(parse(offer)[0], preferences) for offer in offers]
    return max(range(len(offers)), key=merits.__getitem__)


def _merit(offer: Preference, preferences: Sequence[Preference]) -> tuple[float, int, int]:
    """Weight, how specifically it is named, and how early; larger is better.

    Of several ranges that admit the same, the most specific one decides.
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
    """How much a range says of what it admits; None: it does not admit this."""
    kind, _, _ = offer.name.partition("/")
    ranges = ("*/*", f"{kind}/*", offer.name)
    wanted = {each for each in accepted.parameters.items() if each[0] != _WITHOUT_MEANING}
    if accepted.name not in ranges or not wanted <= offer.parameters.items():
        return None
    return ranges.index(accepted.name), len(wanted)
