# SPDX-License-Identifier: GPL-3.0-only
"""Flags, environment and file to one frozen `Settings`."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import configargparse

from tcpexporter.config.reader import LARGEST_BYTES
from tcpexporter.errors import SettingsError, quoted
from tcpexporter.version import VERSION

_PREFIX = "TCPEXPORTER_"
_LONGEST_DURATION_S = (2**63 - 1) // 10**9
"""In nanoseconds it fits into a signed 64-bit number."""


@dataclass(frozen=True)
class Settings:
    """Everything a user can choose."""

    simple: bool = False
    tcpv6: bool = True
    ports: tuple[int, ...] = ()
    """Local ports to watch, ascending; empty: all."""
    listen_address: str | None = None
    """IP address or host name; None: every address, IPv4 and IPv6."""
    listen_port: int = 9690
    duration_s: int = 6
    conf: str | None = None
    direction: str = "inbound"
    """inbound, outbound or all."""
    netns: str = "self"
    """self, all, or the name or path of a network namespace."""
    max_series: int = 2000
    """Of one metric, by port and IP version; the smallest of more are folded into one."""
    source: str = "auto"
    """auto, ebpf, sock_diag or procfs."""
    interval_s: float = 1.0
    """Between two polls of a polling source."""
    max_connections: int | None = 262144
    """None: as many as the host can come to have."""
    reconcile_interval_s: float = 60.0
    """Between two comparisons with the socket tables; 0: only when events were missed."""
    reconcile_cpu_percent: float = 2.0
    """Of one core, what they may use on average."""
    pin: str | None = None
    """A directory of the BPF file system; None: nothing outlives the exporter."""
    unpin: bool = False
    state: str | None = None
    """A file that ages are saved in; None: they are not."""
    user: str = "nobody"
    web_config: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    once: bool = False
    output: str | None = None
    """Where ``once`` puts the page; None: on standard output."""
    features: bool = False


def parse(
    argv: Sequence[str], environ: Mapping[str, str], file: str | None = None
) -> Settings:
    """What the user chose: flags over environment over file over defaults.

    Prints and exits with 0 for ``--help`` and ``--version``.

    Args:
        argv: Without the program's name.
        environ: What may have variables for some.
        file: The text of the file that ``--conf`` names; None: it is read.

    Raises:
        SettingsError: a name is unknown, a value does not parse or the file
            cannot be read; says which, where it came from and what it takes.
    """
    parser = _parser(file)
    # Text only: argparse's own conversion would not know where a value came from.
    parsed = parser.parse_args(_arguments(argv), env_vars=_variables(environ))
    # A value that is -- argparse takes away (before Python 3.13), as if it ended the flags.
    texts = {name: "--" if text == [] else text for name, text in vars(parsed).items()}
    _refuse_unknown_variables(environ)
    origins = _origins(parser)
    values: dict[str, Any] = {
        setting.field: setting.value(texts[setting.name], origins.get(setting.name))
        for setting in _SETTINGS
    }
    address, port = values.pop("listen")
    settings = Settings(listen_address=address, listen_port=port, **values)
    _refuse_contradictions(settings)
    return settings


def _refuse_contradictions(settings: Settings) -> None:
    actions = [name for name in ("once", "unpin", "features") if getattr(settings, name)]
    if len(actions) > 1:
        raise SettingsError(f"{' and '.join(actions)} exclude each other: choose one")
    if settings.output and not settings.once:
        raise SettingsError("output requires once: add --once, or leave out --output")


def misleading(settings: Settings) -> Iterator[str]:
    """What of the settings has no effect, or can only give 0; a sentence each."""
    if settings.direction == "outbound" and settings.ports:
        yield (
            "port names local ports, and that of an outbound connection is one that the"
            " kernel chooses: to count connections to a server's port, leave out --port"
            " (--simple gives one number), or count inbound ones on the server"
        )
    if settings.listen_port in settings.ports and _serves_where_it_counts(settings):
        yield (
            f"port names {settings.listen_port}, which is the exporter's own and is not"
            " counted: choose another one with --listen"
        )
    if settings.once and 0 < settings.duration_s < settings.interval_s and _polls(settings):
        yield (
            "interval is longer than duration, so the socket tables are read only once, and"
            " connections that close meanwhile are counted: choose a shorter --interval"
        )
    for reason, names in _idle(settings):
        if idle := [name for name in names if _is_chosen(name, settings)]:
            yield f"{', '.join(idle)} has no effect with {reason}"


def _serves_where_it_counts(settings: Settings) -> bool:
    return settings.netns == "self" and not settings.once


def _polls(settings: Settings) -> bool:
    return settings.source in ("sock_diag", "procfs")


def _idle(settings: Settings) -> Iterator[tuple[str, Sequence[str]]]:
    """Settings that are not used, and because of which other one."""
    if settings.once:
        yield "once", ("listen", "web-config")
    if settings.simple:
        yield "simple", ("max-series",)
    if settings.source == "ebpf":
        yield "source ebpf", ("interval",)
    if _polls(settings):
        of_ebpf = ("max-connections", "reconcile-interval", "reconcile-cpu", "pin")
        yield f"source {settings.source}", of_ebpf
    if settings.source == "procfs":
        yield "source procfs, which does not tell sockets apart", ("state",)


def _is_chosen(name: str, settings: Settings) -> bool:
    """Whether a setting is not at its default."""
    (setting,) = (each for each in _SETTINGS if each.name == name)
    return setting.among(settings) != setting.among(Settings())


@dataclass(frozen=True)
class Reread:
    """What comes of settings that are read again while the exporter runs."""

    settings: Settings
    """Those in force from then on."""
    changed: tuple[str, ...]
    """What is in force now that was not, such as ``duration is 30``."""
    waiting: tuple[str, ...]
    """The names of those that take a restart."""

    def __str__(self) -> str:
        restart = [f"restart for {', '.join(self.waiting)}"] if self.waiting else []
        changed = [", ".join(self.changed)] if self.changed else []
        return (
            "; ".join(changed + restart) or "nothing that flags and environment let change"
        )


def reread(before: Settings, after: Settings) -> Reread:
    """What can change at once, and what cannot."""
    names = [each.name for each in _SETTINGS if each.among(before) != each.among(after)]
    in_force = replace(
        before, duration_s=after.duration_s, ports=after.ports, log_level=after.log_level
    )
    shown = {
        "duration": str(after.duration_s),
        "port": _shown_ports(after.ports),
        "log-level": after.log_level,
    }
    return Reread(
        in_force,
        tuple(f"{each} is {shown[each]}" for each in names if each in shown),
        tuple(each for each in names if each not in shown),
    )


def _shown_ports(ports: Sequence[int]) -> str:
    """As a user would write them."""
    in_a_row = itertools.groupby(enumerate(ports), lambda each: each[1] - each[0])
    ranges = [[port for _, port in row] for _, row in in_a_row]
    return (
        ",".join(
            f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in ranges
        )
        or "-1"
    )


class _Told(str):
    """A value's text, and where it was written."""

    __slots__ = ("origin",)
    origin: str

    def __new__(cls, text: str, origin: str) -> Self:
        told = super().__new__(cls, text)
        told.origin = origin
        return told


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ships no types
    """A parser that leaves it to its caller to tell the user and to exit."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; --help says what there is")


class _FileFormat(configargparse.ConfigFileParser):  # type: ignore[misc]  # ships no types
    """Lines of ``name value`` or ``name=value``; ``name`` alone turns a switch on."""

    def parse(self, stream: "_File") -> dict[str, _Told]:
        text = _read(stream.path) if stream.text is None else stream.text
        return _items(text, stream.path)


class _File(NamedTuple):
    """A file of settings, with its text if that is known."""

    path: Path
    text: str | None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
        text = content.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _unreadable(path, reason) from error
    if len(content) > LARGEST_BYTES:
        raise _unreadable(path, f"it is larger than {LARGEST_BYTES} bytes")
    return text


def _unreadable(path: Path, reason: object) -> SettingsError:
    return SettingsError(
        f"the settings file {path} (flag --conf or environment variable CONF)"
        f" cannot be read: {reason}"
    )


def _items(text: str, path: Path) -> dict[str, _Told]:
    items: dict[str, _Told] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        name, told = _item(line, f"{path} line {number}")
        if name in items:
            raise SettingsError(f"{told.origin}: {name} is set a second time")
        items[name] = told
    return items


def _item(line: str, origin: str) -> tuple[str, _Told]:
    name, *rest = re.split(r"\s*=\s*|\s+", line, maxsplit=1)
    setting = _FILE_SETTINGS.get(name.replace("_", "-"))
    if setting is None:
        raise SettingsError(
            f"{origin}: {quoted(name)} is not a setting that a file can have; --help lists"
            " them"
        )
    text = rest[0] if rest else "true" if setting.kind is _SWITCH else ""
    return setting.name, _Told(text, origin)


def _arguments(argv: Sequence[str]) -> list[str]:
    """Flags as Go also takes them, in the one form that argparse understands fully.

    Registered with one dash they could be abbreviated whatever ``allow_abbrev``
    says, and a switch with an optional value would swallow the next argument.
    """
    flags = (re.sub(r"^-(?=[a-z]{2})", "--", argument) for argument in argv)
    return [f"{flag}=true" if flag in _SWITCH_FLAGS else flag for flag in flags]


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Of each setting the variable that counts, by the name that the parser looks up."""
    return {
        setting.variables[0]: _Told(environ[name], f"environment variable {name}")
        for setting in _SETTINGS
        for name in reversed(setting.variables)  # the first is entered last and stays
        if name in environ and not _is_of_kubernetes(name, environ[name])
    }


_OF_A_SERVICE = re.compile(
    r"TCPEXPORTER(_[A-Z0-9_]+)?"
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_PORT_OF_A_SERVICE = re.compile(r"TCPEXPORTER(_[A-Z0-9_]+)?_PORT=(tcp|udp|sctp)://.*")


def _is_of_kubernetes(name: str, value: str) -> bool:
    """Whether it is about a Service whose name is or begins with tcpexporter.

    Kubernetes puts these variables into each pod of the namespace:
    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    return bool(
        _OF_A_SERVICE.fullmatch(name) or _PORT_OF_A_SERVICE.fullmatch(f"{name}={value}")
    )


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {name for setting in _SETTINGS for name in setting.variables}
    for name, value in environ.items():
        if (
            name.startswith(_PREFIX)
            and name not in known
            and not _is_of_kubernetes(name, value)
        ):
            raise SettingsError(
                f"environment variable {name}: there is no such setting; --help lists them"
            )


def _origins(parser: _Parser) -> dict[str, str]:
    """Where the text that won was written, by setting; flags and defaults do not say."""
    sources = parser.get_source_to_settings_dict().values()
    return {
        action.dest: text.origin
        for source in sources
        for action, text in source.values()
        if isinstance(text, _Told)
    }


def _parser(file: str | None) -> _Parser:
    parser = _Parser(
        prog="tcpexporter",
        usage="%(prog)s [FLAG ...]",
        description="Tells Prometheus how many TCP connections are long-term.",
        epilog=_EPILOG,
        allow_abbrev=False,
        add_config_file_help=False,
        add_env_var_help=False,
        config_file_parser_class=_FileFormat,
        # _FileFormat reads it, and words what goes wrong
        config_file_open_func=lambda path: _File(Path(path), file),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    for title, settings in _GROUPS.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            group.add_argument(
                *setting.flags,
                dest=setting.name,
                default=setting.default,
                metavar=setting.kind.metavar,
                help=f"{setting.help}; takes {setting.kind.takes}"
                f" (default: {setting.default or 'none'})",
                env_var=setting.variables[0],
                is_config_file_arg=setting.kind is _CONF,
            )
    return parser


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        # int() also takes spaces, underscores and the digits of other scripts.
        if not re.fullmatch("[0-9]+", text) or not lowest <= int(text) <= highest:
            raise ValueError(text)
        return int(text)

    return whole


_port = _whole(1, 65535)


def _connections(text: str) -> int | None:
    return None if text == "auto" else _whole(1, 16_777_216)(text)


def _port_range(text: str) -> range:
    first, dash, last = text.partition("-")
    ports = range(_port(first), _port(last if dash else first) + 1)
    if not ports:
        raise ValueError(text)
    return ports


def _ports(text: str) -> tuple[int, ...]:
    if text == "-1":
        return ()
    ports: list[int] = []
    # In order, so that no port is looked at twice, however often it is named.
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
    if seconds > _LONGEST_DURATION_S or not seconds.is_integer():
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


def _percent(text: str) -> float:
    percent = float(text)
    if not re.fullmatch(r"[0-9.]+", text) or not 0.1 <= percent <= 100:
        raise ValueError(text)
    return percent


def _word(text: str) -> str:
    if not re.fullmatch(r"[^\s:\0]+", text):
        raise ValueError(text)
    return text


def _path(text: str) -> str | None:
    if "\0" in text:
        raise ValueError(text)
    return text or None


@dataclass(frozen=True)
class _Kind:
    """What a setting can be set to."""

    metavar: str
    takes: str
    parse: Callable[[str], object]
    """Raises LookupError or ValueError for what is not as ``takes`` says."""


def _choice(*words: str) -> _Kind:
    *others, last = words
    takes = f"{', '.join(others)} or {last}"
    return _Kind("WORD", takes, {word: word for word in words}.__getitem__)


_BOOLEANS = dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "FALSE", "false", "False"), False
)
"""The words of Go's strconv.ParseBool."""

_SWITCH = _Kind("[=BOOL]", "true or false", _BOOLEANS.__getitem__)
_PORTS = _Kind(
    "PORTS", "-1 for all, or ports from 1 to 65535 as in 443 or 443,8000-8100", _ports
)
_LISTEN = _Kind(
    "[HOST:]PORT",
    "a port from 1 to 65535, alone or after a host as in localhost:9690 or [::1]:9690",
    _listen,
)
_DURATION = _Kind(
    "TIME",
    f"whole seconds from 0 to {_LONGEST_DURATION_S}, or hours, minutes and seconds"
    " as in 1m30s",
    _duration,
)
_INTERVAL = _Kind(
    "TIME", "0.1 to 3600 seconds as in 0.5, or minutes and seconds as in 1m30s", _interval
)
_RECONCILE = _Kind("TIME", "0 for never, or seconds up to 86400, or as in 5m", _reconcile)
_PERCENT = _Kind("PERCENT", "a number from 0.1 to 100", _percent)
_NETNS = _Kind(
    "NETNS", "self, all, a name that ip netns shows, or a path with a slash", _word
)
_CONNECTIONS = _Kind("NUMBER", "auto, or a whole number from 1 to 16777216", _connections)
_SERIES = _Kind("NUMBER", "a whole number from 1 to 16777216", _whole(1, 16_777_216))
_USER = _Kind("USER", "the name of a user", _word)
_DIRECTORY = _Kind(
    "DIR",
    "the path of a directory of the BPF file system, as /sys/fs/bpf/tcpexporter",
    _path,
)
_PATH = _Kind("PATH", "the path of a file", _path)
_CONF = _Kind("PATH", "the path of a file of settings", _path)


@dataclass(frozen=True)
class _Setting:
    """One thing to choose."""

    name: str
    default: str
    """As a user would write it."""
    kind: _Kind
    help: str
    _: KW_ONLY
    alias: str | None = None
    attribute: str | None = None
    """Of `Settings`, where it is not the name."""
    from_go: bool = False
    """The Go program has it too, and its environment variables have no prefix."""

    @property
    def field(self) -> str:
        return self.attribute or self.name.replace("-", "_")

    @property
    def names(self) -> list[str]:
        return [self.name, *([self.alias] if self.alias else [])]

    @property
    def flags(self) -> list[str]:
        return [f"--{name}" for name in self.names]

    @property
    def variables(self) -> list[str]:
        """The environment variables that set it, the one that wins first."""
        names = [name.replace("-", "_").upper() for name in self.names]
        return [_PREFIX + name for name in names] + (names if self.from_go else [])

    def among(self, settings: Settings) -> object:
        """What it is in ``settings``."""
        if self.kind is _LISTEN:
            return settings.listen_address, settings.listen_port
        return getattr(settings, self.field)

    def value(self, text: str, origin: str | None) -> object:
        """What ``text`` means; ``origin`` says where it was written if not in a flag."""
        try:
            return self.kind.parse(text)
        except (LookupError, ValueError):
            raise SettingsError(
                f"{origin or f'flag --{self.name}'}: {self.name} takes {self.kind.takes},"
                f" not {quoted(text)}"
            ) from None


_GROUPS = {
    "what is counted": (
        _Setting(
            "simple",
            "false",
            _SWITCH,
            "one gauge without labels, not one for each port and IP version",
            from_go=True,
        ),
        _Setting("tcpv6", "true", _SWITCH, "count IPv6 connections too", from_go=True),
        _Setting(
            "port",
            "-1",
            _PORTS,
            "count connections to these local ports only",
            attribute="ports",
            from_go=True,
        ),
        _Setting(
            "duration",
            "6",
            _DURATION,
            "how long a connection has been established when it becomes long-term",
            attribute="duration_s",
            from_go=True,
        ),
        _Setting(
            "direction",
            "inbound",
            _choice("inbound", "outbound", "all"),
            "count connections that were opened to this host, from it, or both",
        ),
        _Setting(
            "netns",
            "self",
            _NETNS,
            "count connections of the exporter's network namespace, of every one, or of"
            " another",
        ),
    ),
    "where it is known from": (
        _Setting(
            "source",
            "auto",
            _choice("auto", "ebpf", "sock_diag", "procfs"),
            "what tells about connections, auto being the first of the others that works",
        ),
        _Setting(
            "interval",
            "1",
            _INTERVAL,
            "time between two polls of sock_diag or procfs",
            attribute="interval_s",
        ),
        _Setting(
            "max-connections",
            "262144",
            _CONNECTIONS,
            "how many connections there is room for",
        ),
        _Setting(
            "reconcile-interval",
            "60",
            _RECONCILE,
            "how often what eBPF told is compared with the kernel's socket tables",
            attribute="reconcile_interval_s",
        ),
        _Setting(
            "reconcile-cpu",
            "2",
            _PERCENT,
            "how much of one core that may take on average",
            attribute="reconcile_cpu_percent",
        ),
    ),
    "how it is told": (
        _Setting("listen", "9690", _LISTEN, "serve /metrics here", from_go=True),
        _Setting(
            "web-config",
            "",
            _PATH,
            "serve with TLS, passwords and limits as this file has them, in the format of"
            " Prometheus' own exporters",
        ),
        _Setting(
            "max-series",
            "2000",
            _SERIES,
            "how many series a metric has, one for each port and IP version; the smallest"
            " of more are added up as port other, but those that --port names",
        ),
        _Setting(
            "once",
            "false",
            _SWITCH,
            "print the metrics once, after watching for --duration, and exit",
        ),
        _Setting(
            "output",
            "",
            _PATH,
            "with --once, write the metrics to this file, whole or not at all, as for"
            " node_exporter's textfile collector",
        ),
        _Setting(
            "features",
            "false",
            _SWITCH,
            "print what this kernel has of what differs between kernels, and exit",
        ),
        _Setting(
            "log-level",
            "info",
            _choice("debug", "info", "warning", "error"),
            "log what is at least this severe",
        ),
        _Setting("log-format", "text", _choice("text", "json"), "how a log line looks"),
    ),
    "how it is run": (
        _Setting(
            "pin",
            "",
            _DIRECTORY,
            "have the kernel go on recording when the exporter ends, and take over what it"
            " recorded by way of this directory",
        ),
        _Setting(
            "unpin",
            "false",
            _SWITCH,
            "have the kernel stop recording, forget what is in that directory, and exit",
        ),
        _Setting(
            "state",
            "",
            _PATH,
            "save the ages of connections in this file, where the kernel does not keep them"
            " by --pin, and take over what is there",
        ),
        _Setting("user", "nobody", _USER, "become this user when root is no longer needed"),
        _Setting(
            "conf", "", _CONF, "read settings from here", alias="config", from_go=True
        ),
    ),
}
_SETTINGS = tuple(itertools.chain.from_iterable(_GROUPS.values()))
_SWITCH_FLAGS = {flag for each in _SETTINGS if each.kind is _SWITCH for flag in each.flags}
_FILE_SETTINGS = {each.name: each for each in _SETTINGS if each.kind is not _CONF}

_EPILOG = (
    "A setting can also be a line of the file that --conf names (port 443, port=443, or"
    " simple alone; # begins a line of comment) or an environment variable"
    f" ({_PREFIX}PORT; for "
    + ", ".join(each.name for each in _SETTINGS if each.from_go)
    + " without the prefix too); flags win over environment variables, those over the file."
)
