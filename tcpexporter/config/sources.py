# SPDX-License-Identifier: GPL-3.0-only
"""Reads the texts of settings from flags, the environment and a file, with their origin."""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from tcpexporter.config import files
from tcpexporter.config.rules import RuleError
from tcpexporter.config.values import CONF, SWITCH, Kind, RemedyError, remedy
from tcpexporter.errors import SettingsError, quoted

PREFIX = "TCPEXPORTER_"
"""The beginning of the names of environment variables."""


VARIABLE = "environment variable "
"""The beginning of the origin of a value from the environment."""


class Text(NamedTuple):
    """The text of a value, and the place where it was given."""

    text: str
    origin: str


@dataclass(frozen=True)
class Setting:
    """One setting: its names, its default and its accepted values."""

    name: str
    default: str
    """The default, as a user would write it."""
    kind: Kind
    help: str
    _: KW_ONLY
    alias: str | None = None
    attribute: str | None = None
    """The name of its field in `Settings`, if that differs from ``name``."""
    is_repeatable: bool = False
    """Whether it can be given several times; white space separates the values."""
    from_go: bool = False
    """Whether tcp_established_exporter has it: then a variable needs no prefix."""

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
        """The environment variables of the setting; the first that is set wins."""
        names = [name.replace("-", "_").upper() for name in self.names]
        return [PREFIX + name for name in names] + (names if self.from_go else [])

    def value(self, text: Text) -> object:
        """Return the value that a text stands for.

        Raises:
            SettingsError: the setting does not accept the text.
        """
        try:
            return self.kind.parse(text.text)
        except RuleError as error:
            raise SettingsError(f"{text.origin}: {error}") from None
        except (LookupError, ValueError) as error:
            why = error if isinstance(error, RemedyError) else remedy(self.kind, text.text)
            raise SettingsError(
                f"{text.origin}: {self.name} must be {self.kind.allowed},"
                f" not {quoted(text.text)}{f': {why}' if why else ''}"
            ) from None


Groups = Mapping[str, Sequence[Setting]]
"""All settings, by the title of their group in --help."""


# --- Flags ---


def read_flags(
    parser: argparse.ArgumentParser, groups: Groups, argv: Sequence[str]
) -> tuple[dict[str, Text], list[str]]:
    """Return the value of each given flag, by setting, and the unknown arguments.

    For ``--help`` and ``--version`` it prints the text and exits with 0.

    Args:
        parser: the parser that `make_parser` returned.
        groups: all settings.
        argv: the arguments, without the program's name.

    Raises:
        SettingsError: a flag has no value, or is given twice with different values.
    """
    parsed, unknown = parser.parse_known_args(_normalized(argv, groups))
    given = {name: list(map(_as_text, texts)) for name, texts in vars(parsed).items()}
    for each in _each(groups):
        if each.name in given and not each.is_repeatable:
            if len({*given[each.name]}) > 1:
                raise SettingsError(_given_again(each, given[each.name]))
            del given[each.name][1:]
    return {
        name: Text(" ".join(texts), f"flag --{name}") for name, texts in given.items()
    }, unknown


def _as_text(given: str | list[str]) -> str:
    """Return the value of a flag.

    Before Python 3.13 argparse removes the value "--", because "--" can end the flags.
    """
    return given if isinstance(given, str) else "--"


def _given_again(setting: Setting, texts: Sequence[str]) -> str:
    instead = "give it once"
    if setting.kind.is_list:
        both = ",".join(dict.fromkeys(texts))
        with contextlib.suppress(ValueError):  # -1 and ports, for example, are no list
            setting.kind.parse(both)
            instead = f"write --{setting.name} {both}"
    return f"flag --{setting.name} is given a second time: {instead}"


def _normalized(argv: Sequence[str], groups: Groups) -> list[str]:
    """Return the flags with two dashes, and ``=true`` after a switch without a value.

    tcp_established_exporter also accepts one dash. If flags with one dash were registered
    in argparse, it would accept their abbreviations in spite of ``allow_abbrev``. Without
    ``=true``, argparse would use the next argument as the value of a switch.
    """
    switches = {
        flag for each in _each(groups) if each.kind is SWITCH for flag in each.flags
    }
    flags = (re.sub(r"^-(?=[a-z]{2})", "--", argument) for argument in argv)
    return [f"{flag}=true" if flag in switches else flag for flag in flags]


class _Parser(argparse.ArgumentParser):
    """A parser that raises an error instead of printing it and exiting."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; --help lists all settings")


class _ShowVersion(argparse.Action):
    """Prints the version and exits; argparse's own action requires it in advance."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        # Imported only when it is used: that takes 10 ms of a start.
        from tcpexporter.version import VERSION  # noqa: PLC0415

        sys.stdout.write(f"{parser.prog} {VERSION}\n")
        parser.exit()


def make_parser(groups: Groups) -> argparse.ArgumentParser:
    """Return the parser of flags, which also writes the help."""
    parser = _Parser(
        prog="tcpexporter",
        usage="%(prog)s [FLAG ...]",
        description="Exports the number of long-term TCP connections to Prometheus.",
        epilog=_epilog(groups),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        help="show program's version number and exit",
    )
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for each in settings:
            group.add_argument(
                *each.flags,
                dest=each.name,
                action="append",
                metavar=each.kind.metavar,
                help=f"{each.help}. Value: {each.kind.allowed}"
                f" (default: {each.default or 'none'})",
            )
    return parser


def _epilog(groups: Groups) -> str:
    from_go = ", ".join(each.name for each in _each(groups) if each.from_go)
    return (
        "Each setting can also be given as a line of the file that --conf names: port 443"
        " or port=443. A switch needs no value: simple. Lines that begin with # are"
        " comments."
        f" Each setting can also be given as an environment variable: {PREFIX}PORT=443. The"
        f" variables of {from_go} are also read without the prefix. Flags win over"
        " environment variables, and environment variables over the file."
    )


# --- Environment ---


def read_environment(groups: Groups, environ: Mapping[str, str]) -> dict[str, Text]:
    """Return the value of each environment variable, by setting."""
    return {
        setting.name: Text(environ[name], f"{VARIABLE}{name}")
        for setting in _each(groups)
        for name in reversed(setting.variables)  # the first one overwrites the others
        if name in environ and not _is_of_kubernetes(name, environ[name])
    }


def refuse_unknown_variables(groups: Groups, environ: Mapping[str, str]) -> None:
    """Refuse environment variables that have our prefix but are not a setting.

    Raises:
        SettingsError: there is such a variable.
    """
    known = {name for setting in _each(groups) for name in setting.variables}
    for name, value in environ.items():
        if (
            name.startswith(PREFIX)
            and name not in known
            and not _is_of_kubernetes(name, value)
        ):
            raise SettingsError(
                f"environment variable {name}: there is no such setting; --help lists them"
            )


_OF_A_SERVICE = re.compile(
    r"TCPEXPORTER(_[A-Z0-9_]+)?"
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_PORT_OF_A_SERVICE = re.compile(r"TCPEXPORTER(_[A-Z0-9_]+)?_PORT=(tcp|udp|sctp)://.*")


def _is_of_kubernetes(name: str, value: str) -> bool:
    """Return whether Kubernetes sets this variable for a Service named tcpexporter.

    It sets these variables in each pod of the namespace:
    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    return bool(
        _OF_A_SERVICE.fullmatch(name) or _PORT_OF_A_SERVICE.fullmatch(f"{name}={value}")
    )


# --- File ---


def read_text(path: Path, origin: str) -> str:
    """Return the text of a settings file.

    Args:
        path: the path of the file.
        origin: where the path was given, for the message.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        with files.open_file(path, wait=True) as file:
            return files.read_all(file, only_regular=False).decode()
    except (OSError, ValueError, SettingsError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"{origin}: the settings file {path} cannot be read: {reason}"
        ) from error


def read_lines(groups: Groups, text: str, path: Path) -> dict[str, Text]:
    """Return the value of each line of a settings file, by setting.

    A line is ``name value`` or ``name=value``; ``name`` alone turns a switch on.

    Args:
        groups: all settings.
        text: the text of the file.
        path: the path of the file, for messages.

    Raises:
        SettingsError: a line has an unknown name, or the name of an earlier line.
    """
    known = {each.name: each for each in _each(groups) if each.kind is not CONF}
    found: dict[str, Text] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        name, value = _read_line(line, f"{path} line {number}", known)
        if name in found and not known[name].is_repeatable:
            raise SettingsError(f"{value.origin}: {name} is set a second time")
        if before := found.get(name):
            both = f"{before.text} {value.text}"
            value = Text(both, f"{before.origin}, line {number}")
        found[name] = value
    return found


def _read_line(line: str, origin: str, known: Mapping[str, Setting]) -> tuple[str, Text]:
    name, *rest = re.split(r"\s*=\s*|\s+", line, maxsplit=1)
    setting = known.get(name.replace("_", "-"))
    if setting is None:
        raise SettingsError(
            f"{origin}: {quoted(name)} is not a setting that a file can have;"
            f" {_instead(line, known)}"
        )
    text = rest[0] if rest else "true" if setting.kind is SWITCH else ""
    return setting.name, Text(text, origin)


_LIKE_A_SETTING = re.compile(r"([A-Za-z][A-Za-z_-]*)(?:\s*[:=]\s*|\s+|$)(.*)")
"""A name and a value, as in a shell, in YAML or after the dashes of a flag."""


def _instead(line: str, known: Mapping[str, Setting]) -> str:
    """Return what to do about a line whose name is unknown."""
    found = _LIKE_A_SETTING.fullmatch(line.lstrip("-").removeprefix(PREFIX))
    setting = found and known.get(found[1].lower().replace("_", "-"))
    if not found or not setting:
        return "--help lists them"
    value = found[2].strip("'\"")
    return f"write {quoted(f'{setting.name} {value}'.strip())}"


# --- Defaults ---


def defaults(groups: Groups) -> dict[str, Text]:
    """Return the default of each setting, by setting."""
    return {
        each.name: Text(each.default, f"the default of --{each.name}")
        for each in _each(groups)
    }


def _each(groups: Groups) -> Iterator[Setting]:
    for settings in groups.values():
        yield from settings
