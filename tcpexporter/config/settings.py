# SPDX-License-Identifier: GPL-3.0-only
"""Defines all settings, and combines their values from flags, environment and file."""

import contextlib
import itertools
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tcpexporter.config import files, sources
from tcpexporter.config.sources import Groups, Setting, Text
from tcpexporter.config.values import (
    BUCKETS,
    CONF,
    CONNECTIONS,
    DIRECTORY,
    DURATION,
    INTERVAL,
    LABEL_SET,
    LISTEN,
    NETNS,
    OUTPUT,
    PATH,
    PERCENT,
    PORTS,
    PREFIXES,
    RECONCILE,
    RULES,
    SERIES,
    SWITCH,
    USER,
    one_of,
)
from tcpexporter.connections.expected import Rule
from tcpexporter.errors import SettingsError


@dataclass(frozen=True)
class Settings:
    """The value of each setting."""

    simple: bool = False
    tcpv6: bool = True
    ports: tuple[int, ...] = ()
    """Local ports to count, ascending; empty: all."""
    listen_address: str | None = None
    """IP address or host name; None: every address, IPv4 and IPv6."""
    listen_port: int = 9690
    duration_s: int = 6
    conf: str | None = None
    direction: str = "inbound"
    """inbound, outbound or all."""
    netns: str = "self"
    """self, all, or the name or path of a network namespace."""
    expect: tuple[Rule, ...] = ()
    """Connections that must exist."""
    labels: tuple[str, ...] | None = None
    """Labels of a series; None: port, tcp_version, and netns if all namespaces count."""
    clients: bool = True
    client_prefix: tuple[int, int] = (32, 64)
    """Bits of an IPv4 and of an IPv6 address that identify a client."""
    histograms: bool = False
    buckets: tuple[float, ...] = (1.0, 6.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0, 604800.0)
    """Upper bounds of the histograms in seconds; the duration is added to them."""
    max_series: int = 2000
    """Maximum number of series of a metric; beyond it the smallest are added up."""
    source: str = "auto"
    """auto, ebpf, sock_diag or procfs."""
    interval_s: float = 1.0
    """Seconds between two reads of the socket tables by sock_diag or procfs."""
    max_connections: int | None = 262144
    """Maximum number of tracked connections; None: estimated by `host.capacity`."""
    reconcile_interval_s: float = 60.0
    """Seconds between two reconciliations; 0: only after missed events."""
    reconcile_cpu_percent: float = 2.0
    """Maximum average CPU time of reconciliation, in percent of one core."""
    pin: str | None = None
    """A directory of the BPF file system; None: nothing is pinned."""
    unpin: bool = False
    state: str | None = None
    """The file in which ages are saved; None: they are not saved."""
    user: str = "nobody"
    web_config: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    once: bool = False
    output: str | None = None
    """The file to which ``once`` writes; None: standard output."""
    features: bool = False
    check: bool = False
    given: Mapping[str, Text] = field(default_factory=dict, compare=False)
    """The text of each setting, by its name, and where it was given."""

    @property
    def series_labels(self) -> tuple[str, ...]:
        """The labels of a series."""
        if self.simple:
            return ()
        if self.labels is not None:
            return self.labels
        return ("port", "tcp_version", *(("netns",) if self.netns == "all" else ()))

    @property
    def bounds_s(self) -> tuple[float, ...]:
        """The bounds of the histograms, ascending; empty: there are none."""
        bounds = {*self.buckets, *([float(self.duration_s)] if self.duration_s else [])}
        return tuple(sorted(bounds)) if self.histograms else ()


GROUPS: Groups = {
    "Selection": (
        Setting(
            "simple",
            "false",
            SWITCH,
            "export one number without labels instead of one per port and IP version",
            from_go=True,
        ),
        Setting("tcpv6", "true", SWITCH, "count IPv6 connections too", from_go=True),
        Setting(
            "port",
            "all",
            PORTS,
            "count only connections to these local ports",
            attribute="ports",
            from_go=True,
        ),
        Setting(
            "duration",
            "6",
            DURATION,
            "minimum age of a long-term connection",
            attribute="duration_s",
            from_go=True,
        ),
        Setting(
            "direction",
            "inbound",
            one_of("inbound", "outbound", "all"),
            "count connections opened to this host (inbound), from this host (outbound), or"
            " both",
        ),
        Setting(
            "netns",
            "self",
            NETNS,
            "network namespace to count: the exporter's own, all, or one by its name",
        ),
        Setting(
            "expect",
            "",
            RULES,
            "count the connections that match this rule, because some must exist; can be"
            " given several times",
            is_repeatable=True,
        ),
    ),
    "Source": (
        Setting(
            "source",
            "auto",
            one_of("auto", "ebpf", "sock_diag", "procfs"),
            "where connections are read from; auto tries ebpf, sock_diag, procfs in this"
            " order",
        ),
        Setting(
            "interval",
            "1",
            INTERVAL,
            "time between two reads of the socket tables by sock_diag or procfs",
            attribute="interval_s",
        ),
        Setting(
            "max-connections",
            "262144",
            CONNECTIONS,
            "maximum number of TCP connections that can be tracked",
        ),
        Setting(
            "reconcile-interval",
            "60",
            RECONCILE,
            "time between two reconciliations: comparisons with the socket tables",
            attribute="reconcile_interval_s",
        ),
        Setting(
            "reconcile-cpu",
            "2",
            PERCENT,
            "maximum average CPU time of reconciliation, in percent of one core",
            attribute="reconcile_cpu_percent",
        ),
    ),
    "Output": (
        Setting(
            "listen",
            "9690",
            LISTEN,
            "address and port at which /metrics is served",
            from_go=True,
        ),
        Setting(
            "web-config",
            "",
            PATH,
            "file with TLS, passwords and limits, in the file format of the Prometheus"
            " exporters",
        ),
        Setting(
            "labels",
            "auto",
            LABEL_SET,
            "what is counted separately; auto is port,tcp_version, and netns with --netns"
            " all; none is the same as --simple",
        ),
        Setting(
            "clients",
            "true",
            SWITCH,
            "count the distinct clients (remote addresses) of each series",
        ),
        Setting(
            "client-prefix",
            "32,64",
            PREFIXES,
            "how many leading bits of an IPv4 and of an IPv6 address identify a client",
        ),
        Setting(
            "histograms",
            "false",
            SWITCH,
            "export histograms of the ages of open connections and of the lifetimes of"
            " closed ones",
        ),
        Setting(
            "buckets",
            "1,6,1m,10m,1h,6h,24h,168h",
            BUCKETS,
            "upper bounds of the histograms; --duration is always one of them",
        ),
        Setting(
            "max-series",
            "2000",
            SERIES,
            "maximum number of series of a metric; if there are more, the smallest are"
            " added up as port other, except ports that --port selects",
        ),
        Setting(
            "once",
            "false",
            SWITCH,
            "print the metrics once, after watching for --duration, then exit",
        ),
        Setting(
            "output",
            "",
            OUTPUT,
            "with --once, write the metrics to this file, completely or not at all, for"
            " node_exporter's textfile collector",
        ),
        Setting(
            "features",
            "false",
            SWITCH,
            "list the kernel features that tcpexporter uses and whether this kernel has"
            " them, then exit",
        ),
        Setting(
            "check",
            "false",
            SWITCH,
            "check the settings and what they require on this host, print what would run,"
            " then exit; whether another exporter uses --pin or --state is not checked",
        ),
        Setting(
            "log-level",
            "info",
            one_of("debug", "info", "warning", "error"),
            "lowest severity that is logged",
        ),
        Setting("log-format", "text", one_of("text", "json"), "format of a log line"),
    ),
    "Process": (
        Setting(
            "pin",
            "",
            DIRECTORY,
            "pin the BPF maps in this bpffs directory, so that recording continues while"
            " the exporter is down and the next start adopts it",
        ),
        Setting(
            "unpin",
            "false",
            SWITCH,
            "stop recording: delete what is pinned in the directory of --pin, or else in"
            " /sys/fs/bpf/tcpexporter, then exit",
        ),
        Setting(
            "state",
            "",
            PATH,
            "save connection ages to this file and restore them at start (used when nothing"
            " can be pinned)",
        ),
        Setting("user", "nobody", USER, "unprivileged user to switch to after start-up"),
        Setting(
            "conf", "", CONF, "file to read settings from", alias="config", from_go=True
        ),
    ),
}
SETTINGS = tuple(itertools.chain.from_iterable(GROUPS.values()))


def parse(
    argv: Sequence[str], environ: Mapping[str, str], file: str | None = None
) -> Settings:
    """Return the settings; flags win over environment, environment over file.

    For ``--help`` and ``--version`` it prints the text and exits with 0.

    Args:
        argv: the arguments, without the program's name.
        environ: the environment variables.
        file: the text of the file that ``--conf`` names; None: read the file.

    Raises:
        SettingsError: a name is unknown, a value is invalid, or the file cannot be read.
            The message says which setting, where it was given, and what is allowed.
    """
    parser = sources.make_parser(GROUPS)
    flags, unknown = sources.read_flags(parser, GROUPS, argv)
    variables = sources.read_environment(GROUPS, environ)
    defaults = sources.defaults(GROUPS)
    conf = ChainMap(flags, variables, defaults)["conf"]
    lines = _read_file(conf, file) if conf.text else {}
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    sources.refuse_unknown_variables(GROUPS, environ)
    settings = _combine(ChainMap(flags, variables, lines, defaults))
    _refuse_contradictions(settings)
    return settings


@contextlib.contextmanager
def naming_origins(settings: Settings) -> Iterator[None]:
    """Add to an error about the value of a setting where the value was given.

    Raises:
        SettingsError: the block raised such an error.
    """
    try:
        yield
    except SettingsError as error:
        if error.setting is None:
            raise
        origin = settings.given[error.setting].origin
        raise SettingsError(f"{origin}: {error}") from error


def _read_file(conf: Text, text: str | None) -> dict[str, Text]:
    path = files.expanded(conf.text)
    if text is None:
        text = sources.read_text(path, conf.origin)
    return sources.read_lines(GROUPS, text, path)


def _combine(texts: Mapping[str, Text]) -> Settings:
    given = {each.name: texts[each.name] for each in SETTINGS}
    values: dict[str, Any] = {each.field: each.value(given[each.name]) for each in SETTINGS}
    address, port = values.pop("listen")
    return Settings(listen_address=address, listen_port=port, given=given, **values)


def _refuse_contradictions(settings: Settings) -> None:
    actions = [
        name for name in ("once", "unpin", "features", "check") if getattr(settings, name)
    ]
    if len(actions) > 1:
        given = [f"{name} ({settings.given[name].origin})" for name in actions]
        raise SettingsError(f"{' and '.join(given)} exclude each other: choose one")
    if settings.output and not settings.once:
        raise SettingsError(
            f"{settings.given['output'].origin}: output requires once: add --once, or leave"
            " out --output"
        )
    if "netns" in (settings.labels or ()) and settings.netns != "all":
        raise SettingsError(
            f"{settings.given['labels'].origin}: labels has netns, but only one network"
            " namespace is counted: add --netns all, or leave it out"
        )


def value_in(settings: Settings, setting: Setting) -> object:
    """Return the value of one setting."""
    if setting.kind is LISTEN:
        return settings.listen_address, settings.listen_port
    return getattr(settings, setting.field)
