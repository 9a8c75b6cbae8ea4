# SPDX-License-Identifier: GPL-3.0-only
"""Rules of --expect: their meaning, and the position of a mistake in an invalid rule."""

import ipaddress
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.config.reread import reread
from tcpexporter.config.rules import MOST_RULES, RuleError, parse_rules
from tcpexporter.config.settings import Settings, parse
from tcpexporter.connections.expected import End, Rule
from tcpexporter.connections.parts import Direction
from tcpexporter.errors import SettingsError


def rule(text: str) -> Rule:
    (found,) = parse_rules(text)
    return found


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("192.0.2.10", End(IPv4Network("192.0.2.10/32"))),
        ("192.0.2.10:5432", End(IPv4Network("192.0.2.10/32"), 5432, 5432)),
        ("192.0.2.0/24:80-89", End(IPv4Network("192.0.2.0/24"), 80, 89)),
        ("0.0.0.0/0", End(IPv4Network("0.0.0.0/0"))),
        ("2001:db8::1", End(IPv6Network("2001:db8::1/128"))),
        ("2001:db8::/32", End(IPv6Network("2001:db8::/32"))),
        ("2001:db8:0:0:0:0:0:1", End(IPv6Network("2001:db8::1/128"))),
        ("2001:db8::1:443/128", End(IPv6Network("2001:db8::1:443/128"))),
        ("2001:db8::1:44a", End(IPv6Network("2001:db8::1:44a/128"))),
        ("[2001:db8::1:443]", End(IPv6Network("2001:db8::1:443/128"))),
        ("[2001:db8::1]", End(IPv6Network("2001:db8::1/128"))),
        ("[2001:db8::]/64:443", End(IPv6Network("2001:db8::/64"), 443, 443)),
        ("[::]/0:1-65535", End(IPv6Network("::/0"), 1, 65535)),
    ],
)
def test_an_end_is_a_network_and_ports(written: str, expected: End) -> None:
    """IPv6 addresses are in brackets if a port follows."""
    assert rule(f"a=remote={written}").remote == expected


def test_a_rule_has_all_its_parts() -> None:
    """Their order does not matter."""
    found = rule("db-1=min=2,unit=app@1.service,local=:80-89,direction=outbound")
    assert found.name == "db-1"
    assert found.local == End(None, 80, 89)
    assert found.unit == "app@1.service"
    assert found.direction == Direction.OUTBOUND
    assert found.minimum == 2
    assert rule("a=remote=192.0.2.1").minimum == 1


@pytest.mark.parametrize(
    ("text", "character", "why"),
    [
        ("db", 1, "NAME="),
        ("d/b=remote=192.0.2.1", 1, "NAME="),
        ("db=", 4, "conditions are missing"),
        ("db=min=2", 4, "at least one of"),
        ("db=remote=db.example.com:5432", 11, "is a host name"),
        ("db=remote=:5432", 11, "an address is missing"),
        ("db=remote=192.0.2.256", 11, "is not an IPv4 or IPv6 address"),
        ("db=remote=192.0.2.10/33", 22, "from 0 to 32"),
        ("db=remote=192.0.2.10/", 22, "from 0 to 32"),
        ("db=remote=192.0.2.10/24", 11, "write 192.0.2.0/24"),
        ("db=remote=192.0.2.10:0", 22, "from 1 to 65535"),
        ("db=remote=192.0.2.10:80-x", 25, "from 1 to 65535"),
        ("db=remote=192.0.2.10:80-79", 22, "the lower one"),
        ("db=remote=[192.0.2.10]:80", 12, "no brackets"),
        ("db=remote=[2001:db8::1", 11, "with [ ] around IPv6"),
        ("db=remote=::ffff:192.0.2.1", 11, "write 192.0.2.1"),
        ("db=remote=fe80::1%eth0", 11, "zone"),
        (
            "db=remote=2001:db8::1:443",
            11,
            "write [2001:db8::1]:443, or [2001:db8::1:443] for an address without port",
        ),
        ("db=local=2001:db8::1:80-90", 10, "write [2001:db8::1]:80-90"),
        ("db=local=2001:db8::/64:65000", 10, "write [2001:db8::]/64:65000"),
        ("db=unit=nginx", 14, "ends with one of .service, .scope, .slice, .socket"),
        ("db=unit=backup.timer", 21, "ends with one of .service, "),
        ("# comment", 1, "a comment requires"),
        ("db=local=192.0.2.10", 20, "the port is missing"),
        ("db=remote=192.0.2.10,remote=192.0.2.11", 22, "a second time"),
        ("db=host=192.0.2.10", 4, "'host' is not one of remote, local"),
        ("db=remote=192.0.2.10,min=0", 26, "from 1 to"),
        ("db=remote=192.0.2.10,direction=in", 32, "inbound or outbound"),
        ("db=unit=", 9, "name of a unit"),
    ],
)
def test_a_wrong_rule_is_refused_with_the_position_of_the_mistake(
    text: str, character: int, why: str
) -> None:
    """The sentence has the rule, and what is allowed there."""
    with pytest.raises(RuleError) as caught:
        parse_rules(text)
    first, *_ = text.split()
    assert f"rule '{first}', character {character}: " in str(caught.value)
    assert why in str(caught.value)


def test_names_are_distinct_and_rules_are_limited() -> None:
    """Two series with one name would be an invalid exposition."""
    rules = [f"a{number}=remote=192.0.2.1" for number in range(MOST_RULES + 1)]
    assert len(parse_rules(" ".join(rules[:-1]))) == MOST_RULES
    with pytest.raises(RuleError, match="64 are allowed"):
        parse_rules(" ".join(rules))
    with pytest.raises(RuleError, match="two rules have the name 'a1'"):
        parse_rules(f"{rules[1]} {rules[2]} {rules[1]}")


FIRST, SECOND = "a=remote=192.0.2.1", "b=local=:443"


@pytest.fixture
def conf(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "exporter.conf").write_text(text)
        return str(tmp_path / "exporter.conf")

    return write


def names(settings: Settings) -> list[str]:
    return [each.name for each in settings.expect]


def test_a_rule_can_be_given_several_times(conf: Callable[[str], str]) -> None:
    """Rules can be flags, lines of a file, and words in one environment variable."""
    file = conf(f"expect {FIRST}\nport 443\nexpect = {SECOND}\n")
    environ = {"TCPEXPORTER_EXPECT": f" {FIRST}  {SECOND}\n"}
    for found in (
        parse([f"--expect={FIRST}", "--expect", SECOND], {}),
        parse(["--conf", file], {}),
        parse([], environ),
    ):
        assert names(found) == ["a", "b"]
    assert names(parse([f"--expect={SECOND}", "--conf", file], environ)) == ["b"]


def test_a_refusal_names_the_lines_of_the_file(conf: Callable[[str], str]) -> None:
    """The message also quotes the rule."""
    file = conf(f"expect {FIRST}\n\nexpect b=local=443\n")
    with pytest.raises(SettingsError, match=r"conf line 1, line 3: rule 'b=local=443', "):
        parse(["--conf", file], {})


def test_rules_change_without_a_restart() -> None:
    """The log shows them as the operator wrote them."""
    before, after = parse([f"--expect={FIRST}"], {}), parse([f"--expect={SECOND}"], {})
    done = reread(before, after)
    assert names(done.settings) == ["b"]
    assert str(done) == f"expect is {SECOND}"
    assert str(reread(before, parse([], {}))) == "expect is none"


addresses = st.ip_addresses().filter(
    lambda each: each.version == 4 or not (each.ipv4_mapped or each.scope_id)
)


@given(addresses, st.integers(0, 128), st.integers(1, 65535), st.integers(1, 65535))
def test_any_network_and_ports_are_parsed(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int, one: int, other: int
) -> None:
    """The result equals that of the standard library for the same text."""
    bits = min(bits, address.max_prefixlen)
    network = ipaddress.ip_network(f"{address}/{bits}", strict=False)
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped:
        return
    shown = str(network.network_address)
    shown = f"[{shown}]" if network.version == 6 else shown
    low, high = sorted((one, other))
    found = rule(f"a=remote={shown}/{bits}:{low}-{high}")
    assert found.remote == End(network, low, high)
