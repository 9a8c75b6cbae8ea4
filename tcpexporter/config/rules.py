# SPDX-License-Identifier: GPL-3.0-only
"""Parses the rules of --expect: which connections must exist."""

import ipaddress
import re
from collections.abc import Callable, Mapping

from tcpexporter.connections.expected import End, Network, Rule
from tcpexporter.connections.parts import PORTS, Direction
from tcpexporter.errors import quoted
from tcpexporter.metrics.owners import UNIT_SUFFIXES

MOST_RULES = 64
LONGEST_RULE = 512
MOST_EXPECTED = 16_777_216

ALLOWED = (
    f"at most {MOST_RULES} rules as in db=remote=192.0.2.10:5432,min=2: a name, and some of"
    " remote=ADDRESS[/PREFIX][:PORTS], local=[ADDRESS[/PREFIX]]:PORTS, unit=NAME,"
    " direction=inbound or outbound, min=NUMBER"
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")

_PORT_RANGE = re.compile("[0-9]{1,5}(-[0-9]{1,5})?")
_BRACKETED = re.compile(r"\[(?P<address>[^\]]*)\](?P<prefix>/[^:]*)?(?::(?P<ports>.*))?")
_PLAIN = re.compile(r"(?P<address>[^:/]*)(?P<prefix>/[^:]*)?(?::(?P<ports>.*))?")


class RuleError(ValueError):
    """A rule cannot be used; the text says what is wrong, and where."""


class _WrongPartError(Exception):
    """A part is wrong; ``offset`` is the position of the mistake in the part's value."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return rules that are separated by white space.

    Raises:
        RuleError: a rule is invalid, two have the same name, or there are too many.
    """
    rules = tuple(map(_rule, text.split()))
    names = [each.name for each in rules]
    for each in names:
        if names.count(each) > 1:
            raise RuleError(f"two rules have the name {quoted(each)}: rename one")
    if len(rules) > MOST_RULES:
        raise RuleError(f"there are {len(rules)} rules: {MOST_RULES} are allowed")
    return rules


def _rule(text: str) -> Rule:
    def wrong(offset: int, why: str) -> RuleError:
        return RuleError(f"rule {quoted(text)}, character {offset + 1}: {why}")

    if len(text) > LONGEST_RULE:
        raise wrong(LONGEST_RULE, f"a rule has at most {LONGEST_RULE} characters")
    if text.startswith("#"):
        raise wrong(0, "a comment requires a line of its own")
    name, equals, conditions = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise wrong(0, "a rule begins with NAME=; a name has letters, digits, _, . and -")
    if not conditions:
        raise wrong(len(text), "conditions are missing, such as remote=192.0.2.10:5432")
    found: dict[str, object] = {}
    offset = len(name) + 1
    for part in conditions.split(","):
        key, _, value = part.partition("=")
        if key not in _PARTS:
            allowed = ", ".join(_PARTS)
            raise wrong(offset, f"{quoted(key)} is not one of {allowed}")
        if key in found:
            raise wrong(offset, f"{key} is given a second time")
        try:
            found[key] = _PARTS[key](value)
        except _WrongPartError as error:
            raise wrong(offset + len(key) + 1 + error.offset, str(error)) from None
        offset += len(part) + 1
    if found.keys() <= {"min"}:
        raise wrong(len(name) + 1, "give at least one of remote, local, unit, direction")
    return _made(name, text, **found)


def _made(name: str, text: str, **found: object) -> Rule:
    if "min" in found:
        found["minimum"] = found.pop("min")
    return Rule(name, text, **found)  # type: ignore[arg-type]


def _remote(value: str) -> End:
    end = _end(value)
    if end.network is None:
        raise _WrongPartError(
            0, "an address is missing: any address is 0.0.0.0/0 or [::]/0"
        )
    return end


def _local(value: str) -> End:
    end = _end(value)
    if end == End(end.network):
        raise _WrongPartError(len(value), "the port is missing, as in local=:443")
    return end


def _end(value: str) -> End:
    """Return an end such as 192.0.2.0/24:5432, [2001:db8::1]:443, 2001:db8::1 or :443.

    In 2001:db8::1:443 the last group can be meant as a port, so it is refused.
    """
    is_plain_ipv6 = not value.startswith("[") and value.count(":") > 1
    pattern = _BRACKETED if value.startswith("[") else _PLAIN
    found = pattern.fullmatch(value)
    if is_plain_ipv6:
        return End(_plain_ipv6(value))
    if not found:
        raise _WrongPartError(0, "write ADDRESS[/PREFIX][:PORTS], with [ ] around IPv6")
    first, last = 0, 65535
    if found["ports"] is not None:
        first, last = _ports(found["ports"], found.start("ports"))
    written = found["address"] + (found["prefix"] or "")
    if not written and not value.startswith("["):
        return End(None, first, last)
    network = _network(written, found.start("address"))
    if value.startswith("[") and network.version == 4:
        raise _WrongPartError(1, "an IPv4 address has no brackets")
    return End(network, first, last)


def _plain_ipv6(value: str) -> Network:
    """Return the network of an IPv6 address without brackets."""
    address, _, ports = value.rpartition(":")
    host, slash, prefix = address.partition("/")
    are_ports = _PORT_RANGE.fullmatch(ports) and all(map(_is_port, ports.split("-")))
    if are_ports and _is_ipv6(host):
        alone = f", or [{value}] for an address without port" if _is_ipv6(value) else ""
        raise _WrongPartError(
            0, f"a port may be meant: write [{host}]{slash}{prefix}:{ports}{alone}"
        )
    return _network(value)


def _is_port(text: str) -> bool:
    return 0 < int(text) < PORTS


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _network(written: str, offset: int = 0) -> Network:
    address, slash, prefix = written.partition("/")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        if re.fullmatch("[A-Za-z0-9._-]*[A-Za-z][A-Za-z0-9._-]*", address):
            why = (
                f"{quoted(address)} is a host name, which can mean another address later:"
                " write the address"
            )
        else:
            why = f"{quoted(address)} is not an IPv4 or IPv6 address"
        raise _WrongPartError(offset, why) from None
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id:
            raise _WrongPartError(offset, "an address with a zone (%) is not supported")
        if parsed.ipv4_mapped:
            raise _WrongPartError(offset, f"write {parsed.ipv4_mapped} for IPv4")
    at_prefix = offset + len(address) + 1
    bits: int = parsed.max_prefixlen
    if slash:
        if not re.fullmatch("[0-9]{1,3}", prefix) or int(prefix) > bits:
            raise _WrongPartError(at_prefix, f"a prefix is a number from 0 to {bits}")
        bits = int(prefix)
    network = ipaddress.ip_network((parsed, bits), strict=False)
    if network.network_address != parsed:
        why = f"bits after the prefix are not 0: write {network}"
        raise _WrongPartError(offset, why)
    return network


def _ports(text: str, offset: int) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    lowest = _port(first, offset)
    highest = _port(last, offset + len(first) + 1) if dash else lowest
    if highest < lowest:
        raise _WrongPartError(offset, "the first port of a range is the lower one")
    return lowest, highest


def _port(text: str, offset: int) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise _WrongPartError(offset, "a port is a number from 1 to 65535")
    return int(text)


def _unit(value: str) -> str:
    if not _UNIT.fullmatch(value):
        raise _WrongPartError(0, "this is not the name of a unit, as in nginx.service")
    if not value.endswith(UNIT_SUFFIXES):
        raise _WrongPartError(
            len(value),
            f"the name of a unit ends with one of {', '.join(UNIT_SUFFIXES)}, as in"
            " nginx.service",
        )
    return value


def _direction(value: str) -> Direction:
    try:
        return {"inbound": Direction.INBOUND, "outbound": Direction.OUTBOUND}[value]
    except KeyError:
        raise _WrongPartError(0, "the direction must be inbound or outbound") from None


def _minimum(value: str) -> int:
    if not re.fullmatch("[0-9]{1,8}", value) or not 1 <= int(value) <= MOST_EXPECTED:
        raise _WrongPartError(0, f"min must be a whole number from 1 to {MOST_EXPECTED}")
    return int(value)


_PARTS: Mapping[str, Callable[[str], object]] = {
    "remote": _remote,
    "local": _local,
    "unit": _unit,
    "direction": _direction,
    "min": _minimum,
}
