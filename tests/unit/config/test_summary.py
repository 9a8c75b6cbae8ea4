# SPDX-License-Identifier: GPL-3.0-only
"""The sentences about the settings in the log and in the output of --check."""

import pytest

from tcpexporter.config import summary
from tcpexporter.config.misleading import in_environment, unprefixed
from tcpexporter.config.rules import parse_rules
from tcpexporter.config.settings import Settings, parse


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), "inbound connections of every local port, long-term from 6 s"),
        (
            Settings(ports=(443,), direction="all", duration_s=30),
            "inbound and outbound connections of local port 443, long-term from 30 s",
        ),
        (
            Settings(ports=(80, 443), direction="outbound", tcpv6=False),
            (
                "outbound connections of local ports 80, 443 over IPv4 only, "
                "long-term from 6 s"
            ),
        ),
        (
            Settings(ports=(7001,), direction="outbound", labels=("remote_port",)),
            "outbound connections to remote port 7001, long-term from 6 s",
        ),
        (
            Settings(direction="all", labels=("port", "remote_port")),
            (
                "inbound connections of every local port and outbound connections to every"
                " remote port, long-term from 6 s"
            ),
        ),
        (
            Settings(netns="all"),
            (
                "inbound connections of every local port in all network namespaces, "
                "long-term from 6 s"
            ),
        ),
        (
            Settings(ports=tuple(range(8000, 8011)), netns="blue"),
            (
                "inbound connections of 11 local ports in network namespace blue, "
                "long-term from 6 s"
            ),
        ),
    ],
)
def test_the_log_says_what_is_counted(settings: Settings, expected: str) -> None:
    """It names the direction, the ports, the IP version, the namespace and the duration."""
    assert summary.counted(settings) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "http://localhost:9690/"),
        ("::", "http://localhost:9690/"),
        ("0.0.0.0", "http://localhost:9690/"),
        ("192.0.2.7", "http://192.0.2.7:9690/"),
        ("2001:db8::7", "http://[2001:db8::7]:9690/"),
    ],
)
def test_the_log_has_an_address_that_can_be_opened(
    address: str | None, expected: str
) -> None:
    """A browser cannot open an address that stands for all addresses."""
    assert summary.url(Settings(listen_address=address), has_tls=False) == expected
    secure = summary.url(Settings(listen_address=address), has_tls=True)
    assert secure == expected.replace("http:", "https:")


@pytest.mark.parametrize(
    ("rule", "understood"),
    [
        (
            "db=remote=192.0.2.10:5432,min=2",
            "at least 2 connections for db: remote 192.0.2.10/32 port 5432",
        ),
        ("net=remote=192.0.2.0/24", "at least 1 connection for net: remote 192.0.2.0/24"),
        (
            "v6=remote=[2001:db8::1]:443,unit=a.service,direction=outbound",
            (
                "at least 1 connection for v6: remote 2001:db8::1/128 port 443, unit"
                " a.service, outbound"
            ),
        ),
        ("web=local=:80-90", "at least 1 connection for web: local ports 80-90"),
    ],
)
def test_a_rule_is_shown_as_it_was_understood(rule: str, understood: str) -> None:
    """A mistake in a rule is visible before a connection is missed."""
    (parsed,) = parse_rules(rule)
    assert summary.expected(parsed) == f"expect {understood}"


def test_check_names_the_labels() -> None:
    """Without labels there is one number."""
    assert summary.labels(Settings()) == "label each series with port, tcp_version"
    assert summary.labels(Settings(simple=True)) == "export one number only"


@pytest.mark.parametrize(
    "given",
    [
        ["--port=443,8000-8100", "--listen=[::1]:80", "--max-connections=auto"],
        ["--buckets=0.5,90,31536000", "--duration=30", "--reconcile-cpu=0.5"],
        ["--labels=port,unit", "--client-prefix=24,64", "--listen=localhost:9691"],
        ["--labels=none", "--state=/var/lib/x/state", "--listen=9691", "--tcpv6=false"],
        ["--expect=db=remote=192.0.2.10:5432,min=2", "--histograms=true"],
    ],
)
def test_the_status_page_shows_flags_that_can_be_copied(given: list[str]) -> None:
    """They have the names of --help, and give the same settings again."""
    settings = parse(given, {})
    shown = [f"{flag}={value}" for flag, value in summary.flags(settings).items()]
    assert {*given} <= {*shown}
    assert parse([each for each in shown if not each.endswith("=")], {}) == settings


def test_the_log_proposes_settings_only_if_none_chose_the_series() -> None:
    """If the operator has chosen labels, the log does not propose any."""
    assert "--labels port,unit" in summary.advice(Settings())
    assert summary.advice(Settings(labels=("port",))) == ""
    assert summary.advice(Settings(simple=True)) == ""


def test_settings_of_the_environment_are_listed_unless_a_flag_overrides_them() -> None:
    """Many platforms set PORT, which selects local ports here."""
    environ = {"PORT": "8080", "TCPEXPORTER_DURATION": "30", "SIMPLE": "true", "HOME": "/"}
    assert in_environment(parse(["--simple=false"], environ)) == [
        "PORT=8080",
        "TCPEXPORTER_DURATION=30",
    ]
    assert in_environment(parse([], {})) == []


def test_a_variable_without_the_prefix_is_reported_unless_it_has_no_effect() -> None:
    """A platform that sets PORT for every program would select the counted ports."""
    environ = {"PORT": "8080", "TCPEXPORTER_DURATION": "3", "DURATION": "4", "SIMPLE": "1"}
    (sentence,) = unprefixed(parse(["--simple=false"], environ))
    assert sentence == (
        "environment variable PORT sets port to '8080': rename it to TCPEXPORTER_PORT, or"
        " unset it if it is not meant for tcpexporter"
    )
