# SPDX-License-Identifier: GPL-3.0-only
"""Parses the values of settings; describes which values each kind of setting accepts."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from tcpexporter.config import rules
from tcpexporter.errors import quoted

MOST_BUCKETS = 24
TEN_YEARS_S = 10 * 365 * 86400

LABELS = (
    "port",
    "tcp_version",
    "direction",
    "netns",
    "remote_port",
    "unit",
    "container",
    "pod",
)
"""The labels that a series can have, in the order of an exposition."""

LONGEST_DURATION_S = (2**63 - 1) // 10**9
"""The longest duration: in nanoseconds it fits into a signed 64-bit number."""


class RemedyError(ValueError):
    """A value is not accepted; the text says what is wrong with it."""


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        # int() would also accept spaces, underscores and the digits of other scripts.
        if not re.fullmatch("[0-9]+", text) or not lowest <= int(text) <= highest:
            raise ValueError(text)
        return int(text)

    return whole


_port = _whole(1, 65535)


def _connections(text: str) -> int | None:
    return None if text == "auto" else _whole(1, 16_777_216)(text)


def _port_range(text: str) -> range:
    first, dash, last = text.partition("-")
    lowest, highest = _port(first), _port(last if dash else first)
    if highest < lowest:
        raise RemedyError(
            f"{lowest}-{highest} is a descending range, write {highest}-{lowest}"
        )
    return range(lowest, highest + 1)


def _ports(text: str) -> tuple[int, ...]:
    if text in ("all", "-1"):  # tcp_established_exporter has -1
        return ()
    ports: list[int] = []
    # In ascending order and without duplicates.
    for each in sorted(map(_port_range, text.split(",")), key=lambda each: each.start):
        ports.extend(range(max(each.start, ports[-1] + 1 if ports else 0), each.stop))
    return tuple(ports)


def _host(text: str) -> str:
    if bracketed := re.fullmatch(r"\[(.*)\]", text):
        address = IPv6Address(bracketed[1])
        return str(address.ipv4_mapped or address)
    if re.fullmatch("[0-9.]+", text):
        return str(IPv4Address(text))
    if not re.fullmatch("[A-Za-z0-9._-]+", text):
        raise ValueError(text)
    return text


def _listen(text: str) -> tuple[str | None, int]:
    host, _, port = text.rpartition(":")
    return _host(host) if host else None, _port(port)


def _seconds(text: str) -> float:
    pattern = r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9.]+)s)?|([0-9.]+)"
    match = re.fullmatch(pattern, text)
    if not text or not match:
        raise ValueError(text)
    hours, minutes, seconds, plain = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + plain


def _duration(text: str) -> int:
    seconds = _seconds(text)
    if seconds > LONGEST_DURATION_S or not seconds.is_integer():
        raise ValueError(text)
    return int(seconds)


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if not 0.1 <= seconds <= 3600:
        raise ValueError(text)
    return seconds


def _reconcile(text: str) -> float:
    seconds = _seconds(text)
    if seconds > 86400:
        raise ValueError(text)
    return seconds


def _buckets(text: str) -> tuple[float, ...]:
    bounds = sorted({_seconds(each) for each in text.split(",")})
    if len(bounds) > MOST_BUCKETS or not 0.001 <= bounds[0] <= bounds[-1] <= TEN_YEARS_S:
        raise ValueError(text)
    return tuple(bounds)


def _labels(text: str) -> tuple[str, ...] | None:
    if text == "auto":
        return None
    chosen = [] if text == "none" else text.split(",")
    if not {*chosen} <= {*LABELS}:
        raise ValueError(text)
    for each in LABELS:
        if chosen.count(each) > 1:
            raise RemedyError(f"{each} is given twice")
    return tuple(each for each in LABELS if each in chosen)


def _prefixes(text: str) -> tuple[int, int]:
    ipv4, ipv6 = text.split(",")
    return _whole(1, 32)(ipv4), _whole(1, 128)(ipv6)


def _percent(text: str) -> float:
    percent = float(text)
    if not re.fullmatch(r"[0-9.]+", text) or not 0.1 <= percent <= 100:
        raise ValueError(text)
    return percent


def _word(text: str) -> str:
    if not re.fullmatch(r"[^\s:\0]+", text):
        raise ValueError(text)
    return text


def _output(text: str) -> str | None:
    if text == "-":
        raise RemedyError("without --output, --once prints the metrics")
    return _path(text)


def _path(text: str) -> str | None:
    if "\0" in text:
        raise ValueError(text)
    return text or None


@dataclass(frozen=True)
class Kind:
    """A kind of value: how to describe it and how to parse it."""

    metavar: str
    """The placeholder of the value in --help."""
    allowed: str
    """The accepted values, as the end of a sentence with "must be"."""
    parse: Callable[[str], object]
    """Parses a text; raises LookupError or ValueError if the text is not accepted."""
    words: tuple[str, ...] = ()
    """All accepted values, if they are a few words; else empty."""
    is_list: bool = False
    """Whether a value can be a list of several values, separated by commas."""


def remedy(kind: Kind, text: str) -> str | None:
    """Return how to correct a text that a kind does not accept; None: it is not known."""
    listed = re.sub(r"[\s,]+", ",", text.strip())
    if (kind.is_list or "," in text) and _accepts(kind, listed):
        return f"write {quoted(listed)}, without spaces"
    if _accepts(kind, re.split(r"\s+#", text, maxsplit=1)[0]):
        return "a comment requires a line of its own"
    if _accepts(kind, text.strip("'\"")):
        return "write it without quotes"
    return None


def _accepts(kind: Kind, text: str) -> bool:
    try:
        kind.parse(text)
    except (LookupError, ValueError):
        return False
    return True


def one_of(*words: str) -> Kind:
    """Return the kind that accepts these words."""
    *others, last = words
    allowed = f"{', '.join(others)} or {last}"
    return Kind("WORD", allowed, {word: word for word in words}.__getitem__, words)


_BOOLEANS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)
"""The words that Go's strconv.ParseBool accepts."""

SWITCH = Kind("[=BOOL]", "true or false", _BOOLEANS.__getitem__, ("true", "false"))
PORTS = Kind(
    "PORTS",
    "all (or -1), or ports from 1 to 65535 as in 443 or 443,8000-8100",
    _ports,
    is_list=True,
)
LISTEN = Kind(
    "[HOST:]PORT",
    "a port from 1 to 65535, alone or after a host as in localhost:9690 or [::1]:9690",
    _listen,
)
DURATION = Kind(
    "TIME",
    f"whole seconds from 0 to {LONGEST_DURATION_S}, or hours, minutes and seconds"
    " as in 1m30s",
    _duration,
)
INTERVAL = Kind(
    "TIME",
    "a number of seconds from 0.1 to 3600, or minutes and seconds as in 1m30s",
    _interval,
)
RECONCILE = Kind(
    "TIME",
    "0 (only after missed events), seconds up to 86400, or minutes as in 5m",
    _reconcile,
)
PERCENT = Kind("PERCENT", "a number from 0.1 to 100", _percent)
NETNS = Kind(
    "NETNS", "self, all, a name that ip netns shows, or a path that contains a slash", _word
)
CONNECTIONS = Kind("NUMBER", "auto, or a whole number from 1 to 16777216", _connections)
SERIES = Kind("NUMBER", "a whole number from 1 to 16777216", _whole(1, 16_777_216))
LABEL_SET = Kind(
    "LABELS",
    f"auto, none, or some of {', '.join(LABELS)}, separated by commas",
    _labels,
    is_list=True,
)
BUCKETS = Kind(
    "TIMES",
    f"at most {MOST_BUCKETS} times from 0.001 seconds to 10 years, as in 1,1m30s,24h",
    _buckets,
    is_list=True,
)
RULES = Kind("NAME=RULE", rules.ALLOWED, rules.parse_rules)
PREFIXES = Kind(
    "BITS,BITS", "a number from 1 to 32, a comma, and a number from 1 to 128", _prefixes
)
USER = Kind("USER", "the name of a user", _word)
DIRECTORY = Kind(
    "DIR",
    "the path of a directory in the BPF file system, as in /sys/fs/bpf/tcpexporter",
    _path,
)
PATH = Kind("PATH", "the path of a file", _path)
OUTPUT = Kind("PATH", "the path of a file", _output)
CONF = Kind("PATH", "the path of a settings file", _path)
