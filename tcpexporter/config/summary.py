# SPDX-License-Identifier: GPL-3.0-only
"""Says what the settings select, for the log, ``--check`` and the status page."""

import itertools
from collections.abc import Sequence

from tcpexporter.config.settings import SETTINGS, Settings, value_in
from tcpexporter.config.sources import Setting
from tcpexporter.config.values import LISTEN, PORTS
from tcpexporter.connections.expected import ANY, End, Rule

_NAMESPACES = {"self": "", "all": " in all network namespaces"}

_ADVICE = (
    "--labels port,unit shows which service owns the connections, --histograms how old they"
    " are; --help lists all settings"
)

FEWEST_OF_RANGE = 3
"""Minimum number of ports in a row that are shown as a range."""

MOST_PORTS = 10
"""Maximum number of ports that are listed; of more ports, only the number is shown."""


def counted(settings: Settings) -> str:
    """Return what is counted, such as "inbound connections of every local port"."""
    version = "" if settings.tcpv6 else " over IPv4 only"
    netns = _NAMESPACES.get(settings.netns, f" in network namespace {settings.netns}")
    what = f"{_directions(settings)}{version}{netns}"
    return f"{what}, long-term from {settings.duration_s} s"


def _directions(settings: Settings) -> str:
    """Return the directions, with the ports that --port selects in each of them."""
    local, remote = (_ports(settings.ports, each) for each in ("local", "remote"))
    if "remote_port" not in settings.series_labels or settings.direction == "inbound":
        both = "inbound and outbound"
        return f"{settings.direction.replace('all', both)} connections of {local}"
    outbound = f"outbound connections to {remote}"
    if settings.direction == "outbound":
        return outbound
    return f"inbound connections of {local} and {outbound}"


def _ports(ports: tuple[int, ...], end: str) -> str:
    match len(ports):
        case 0:
            return f"every {end} port"
        case 1:
            return f"{end} port {ports[0]}"
        case number if number > MOST_PORTS:
            return f"{number} {end} ports"
    return f"{end} ports {', '.join(map(str, ports))}"


def labels(settings: Settings) -> str:
    """Return how series are distinguished, as the end of a sentence with "would"."""
    if not settings.series_labels:
        return "export one number only"
    return f"label each series with {', '.join(settings.series_labels)}"


def expected(rule: Rule) -> str:
    """Return how a rule was understood, as the end of a sentence with "would"."""
    many = "connection" if rule.minimum == 1 else "connections"
    ends = (("remote", rule.remote), ("local", rule.local))
    conditions = [f"{name} {_end(end)}" for name, end in ends if end != ANY]
    if rule.unit:
        conditions.append(f"unit {rule.unit}")
    if rule.direction is not None:
        conditions.append(rule.direction.name.lower())
    return f"expect at least {rule.minimum} {many} for {rule.name}: {', '.join(conditions)}"


def _end(end: End) -> str:
    parts = [] if end.network is None else [str(end.network)]
    if end.first_port == end.last_port:
        parts.append(f"port {end.first_port}")
    elif end[1:] != ANY[1:]:
        parts.append(f"ports {end.first_port}-{end.last_port}")
    return " ".join(parts)


def url(settings: Settings, *, has_tls: bool) -> str:
    """Return the address of the status page, which ends with a slash."""
    scheme = "https" if has_tls else "http"
    address = settings.listen_address
    if address in (None, "", "::", "0.0.0.0"):  # noqa: S104
        address = "localhost"
    elif ":" in str(address):
        address = f"[{address}]"
    return f"{scheme}://{address}:{settings.listen_port}/"


def advice(settings: Settings) -> str:
    """Return what to try next; empty if the operator has chosen what is shown."""
    return "" if settings.simple or settings.labels is not None else _ADVICE


def flags(settings: Settings) -> dict[str, str]:
    """Return each flag and its value, as an operator writes it; empty: it has none."""
    return {f"--{each.name}": _written(value_in(settings, each), each) for each in SETTINGS}


def _written(value: object, setting: Setting) -> str:
    if value == value_in(Settings(), setting):
        return setting.default
    if setting.kind is PORTS and isinstance(value, tuple):
        return _ranges(value)
    if setting.kind is LISTEN and isinstance(value, tuple):
        host, port = value
        host = f"[{host}]" if ":" in (host or "") else host
        return f"{host}:{port}" if host else str(port)
    if setting.is_repeatable and isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, tuple):
        return ",".join(map(_plain, value)) or "none"
    # The default of --max-connections is a number, and None stands for its other value.
    return "auto" if value is None else _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _ranges(ports: Sequence[int]) -> str:
    """Return ports as an operator writes them: ``443,8000-8100``."""
    in_a_row = itertools.groupby(enumerate(ports), lambda each: each[1] - each[0])
    ranges = [[port for _, port in row] for _, row in in_a_row]
    return ",".join(
        f"{each[0]}-{each[-1]}"
        if len(each) >= FEWEST_OF_RANGE
        else ",".join(map(str, each))
        for each in ranges
    )
