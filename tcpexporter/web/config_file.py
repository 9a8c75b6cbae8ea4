# SPDX-License-Identifier: GPL-3.0-only
"""Parses a web configuration file (--web-config): from YAML to one `WebConfig`.

The format is that of https://github.com/prometheus/exporter-toolkit,
docs/web-configuration.md. The error for an unsupported feature names the feature: an
operator must not rely on a protection that is not in force. All values are read as text, so
that YAML does not convert a password hash or ``1s``.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import yaml

from tcpexporter.errors import SettingsError, WebConfigError, quoted
from tcpexporter.web.config import (
    CIPHERS,
    NO_CERTIFICATE,
    VERIFIED,
    VERIFIED_IF_GIVEN,
    RateLimit,
    Tls,
    WebConfig,
)

TLS_VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")

TLS13_CIPHERS = (
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
)
"""Cipher suites of TLS 1.3. They are always enabled; to list them has no effect, as in
exporter-toolkit."""

CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
}
"""OpenSSL's name for Go's name of each curve. Python's ssl cannot select only X25519."""

HEADERS: Mapping[str, tuple[str, ...]] = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
"""Headers that can be added, with their allowed values; an empty tuple allows any text."""

_T = TypeVar("_T")

_SECTIONS = ("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")

_TLS_KEYS = (
    "cert",
    "cert_file",
    "key",
    "key_file",
    "client_ca",
    "client_ca_file",
    "client_auth_type",
    "client_allowed_sans",
    "min_version",
    "max_version",
    "cipher_suites",
    "prefer_server_cipher_suites",
    "curve_preferences",
)

_CLIENT_AUTH_TYPES = (
    NO_CERTIFICATE,
    "RequestClientCert",
    "RequireAnyClientCert",
    "RequireClientCert",  # an older name of RequireAnyClientCert
    VERIFIED_IF_GIVEN,
    VERIFIED,
)

_NULLS = ("", "~", "null", "Null", "NULL")
_YES = ("true", "yes", "on", "y")
_NO = ("false", "no", "off", "n")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_LONGEST_S = (2**63 - 1) / 1e9
"""Go's longest duration: 2^63 - 1 nanoseconds."""
_BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")


def parse(text: str, path: str, read: Callable[[str], str]) -> WebConfig:
    """Parse the text of a web configuration file.

    Args:
        text: the text of the file, in YAML.
        path: the path of the file, for error messages.
        read: a function that returns the content of a file that the configuration names.

    Raises:
        WebConfigError: a name is unknown, or a value is invalid or not supported. The
            message says where, and what is allowed. It never contains a secret.
    """
    return _File(path, read).config(_compose(text, path))


def _compose(text: str, path: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise WebConfigError(f"{path}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise WebConfigError(f"{path}: not YAML: {reason}") from error
    except (ValueError, OverflowError) as error:  # a number in %YAML or after a backslash
        raise WebConfigError(f"{path}: not YAML: a number in it is too large") from error
    except RecursionError as error:
        raise WebConfigError(f"{path}: lists or mappings are nested too deeply") from error


_Entries = dict[str, tuple[yaml.Node, yaml.Node]]
"""Entries of a mapping: the nodes of key and value, by the text of the key."""


class _File:
    """Parses one file; each method parses one part."""

    def __init__(self, path: str, read: Callable[[str], str]) -> None:
        self._path = path
        self._read = read

    def config(self, root: yaml.Node | None) -> WebConfig:
        given = self._known(root, "the file", _SECTIONS)
        sections = {name: section for name, (_, section) in given.items()}
        return WebConfig(
            tls=self._tls(sections.get("tls_server_config")),
            headers=self._headers(sections.get("http_server_config")),
            users=self._users(sections.get("basic_auth_users")),
            rate_limit=self._rate_limit(sections.get("rate_limit")),
        )

    # Sections

    def _tls(self, section: yaml.Node | None) -> Tls | None:
        given = self._known(section, "tls_server_config", _TLS_KEYS)
        if not given:
            return None
        pem = {name: self._pem(given, name) for name in ("cert", "key", "client_ca")}
        for name in ("cert", "key"):
            if pem[name] is None:
                raise self._wrong(
                    section, f"tls_server_config requires {name} or {name}_file"
                )
        tls = Tls(
            cert=pem["cert"] or "",
            key=pem["key"] or "",
            client_ca=pem["client_ca"],
            client_auth_type=self._client_auth_type(given),
            client_allowed_sans=self._list(given, "client_allowed_sans"),
            min_version=self._choice(given, "min_version", TLS_VERSIONS, "TLS12"),
            max_version=self._choice(given, "max_version", TLS_VERSIONS, "TLS13"),
            cipher_suites=self._cipher_suites(given),
            prefer_server_cipher_suites=self._bool(
                given, "prefer_server_cipher_suites", default=True
            ),
            curve=self._curve(given),
        )
        self._check(tls, section)
        return tls

    def _check(self, tls: Tls, section: yaml.Node | None) -> None:
        """Refuse valid values that contradict each other."""
        verified = tls.client_auth_type != NO_CERTIFICATE
        if tls.client_ca is not None and not verified:
            raise self._wrong(
                section,
                "a client CA has no effect without client_auth_type: set"
                f" client_auth_type to {VERIFIED}",
            )
        if tls.client_allowed_sans is not None and not verified:
            raise self._wrong(
                section,
                "client_allowed_sans has no effect without client_auth_type: set"
                f" client_auth_type to {VERIFIED}",
            )
        if tls.min_version > tls.max_version:
            raise self._wrong(
                section,
                f"min_version {tls.min_version} is above max_version {tls.max_version}",
            )
        if (
            tls.cipher_suites
            and not set(tls.cipher_suites) & CIPHERS.keys()
            and tls.max_version != "TLS13"
        ):
            raise self._wrong(section, f"cipher_suites has no suite of {tls.max_version}")

    def _headers(self, section: yaml.Node | None) -> dict[str, str]:
        given = self._known(section, "http_server_config", ("http2", "headers"))
        if self._bool(given, "http2", default=False):
            raise self._wrong(
                given["http2"][0],
                "http2 is not supported: leave it out, or set it to false",
            )
        _, headers = given.get("headers", (None, None))
        found = self._known(headers, "headers", tuple(HEADERS))
        return {
            name: text
            for name, allowed in HEADERS.items()
            if (text := self._choice(found, name, allowed, ""))
        }

    def _users(self, section: yaml.Node | None) -> dict[str, str]:
        users = {}
        for name, (key, value) in self._entries(section, "basic_auth_users").items():
            # An invalid value may be a password, so the message does not contain it.
            if not isinstance(value, yaml.ScalarNode) or not _BCRYPT_HASH.fullmatch(
                value.value
            ):
                raise self._wrong(
                    key,
                    f"user {quoted(name)} requires a bcrypt hash of the password, as"
                    " `htpasswd -nBC 10 USER` prints it",
                )
            users[name] = value.value
        return users

    def _rate_limit(self, section: yaml.Node | None) -> RateLimit | None:
        given = self._known(section, "rate_limit", ("interval", "burst"))
        if not given:
            return None
        for name in ("interval", "burst"):
            if name not in given:
                raise self._wrong(section, f"rate_limit requires {name} too")
        interval_s = self._parsed(
            given,
            "interval",
            _go_duration_s,
            "a time with its unit as in 1s, or 0 for no limit",
        )
        burst = self._parsed(given, "burst", _whole, "a whole number, 0 or more")
        return RateLimit(interval_s, burst) if interval_s else None

    # Values

    def _pem(self, given: _Entries, name: str) -> str | None:
        file = f"{name}_file"
        if name in given and file in given:
            raise self._wrong(given[file][0], f"give one of {name} or {file}, not both")
        if name in given:
            return self._text(given[name][1], name)
        if file not in given:
            return None
        try:
            return self._read(self._text(given[file][1], file))
        except SettingsError as error:
            raise self._wrong(given[file][0], f"{file} {error}") from error

    def _client_auth_type(self, given: _Entries) -> str:
        name = "client_auth_type"
        chosen = self._choice(given, name, _CLIENT_AUTH_TYPES, NO_CERTIFICATE)
        if chosen in (NO_CERTIFICATE, VERIFIED_IF_GIVEN, VERIFIED):
            return chosen
        raise self._wrong(
            given[name][0],
            f"{name} {chosen} is not supported, because it accepts unverified certificates:"
            f" choose {VERIFIED}, {VERIFIED_IF_GIVEN} or {NO_CERTIFICATE}",
        )

    def _cipher_suites(self, given: _Entries) -> tuple[str, ...]:
        name = "cipher_suites"
        suites = self._list(given, name) or ()
        for suite in suites:
            if suite not in CIPHERS and suite not in TLS13_CIPHERS:
                raise self._wrong(
                    given[name][0],
                    f"each of {name} must be {_listed((*CIPHERS, *TLS13_CIPHERS))},"
                    f" not {quoted(suite)}",
                )
        return suites

    def _curve(self, given: _Entries) -> str | None:
        name = "curve_preferences"
        curves = self._list(given, name) or ()
        for curve in curves:
            if curve not in (*CURVES, "X25519"):
                raise self._wrong(
                    given[name][0],
                    f"each of {name} must be {_listed(tuple(CURVES))}, not {quoted(curve)}",
                )
        if len(curves) > 1 or "X25519" in curves:
            raise self._wrong(
                given[name][0],
                f"{name} with X25519 or several curves is not supported: choose one of"
                f" {_listed(tuple(CURVES))}, or leave it out for all curves",
            )
        return CURVES[curves[0]] if curves else None

    def _bool(self, given: _Entries, name: str, *, default: bool) -> bool:
        if name not in given:
            return default
        return self._parsed(given, name, _boolean, "true or false")

    def _choice(
        self, given: _Entries, name: str, allowed: tuple[str, ...], default: str
    ) -> str:
        if name not in given:
            return default
        text = self._text(given[name][1], name)
        if allowed and text not in allowed:
            raise self._wrong(
                given[name][0], f"{name} must be {_listed(allowed)}, not {quoted(text)}"
            )
        if not text.isprintable():
            raise self._wrong(given[name][0], f"{name} must be one line of text")
        return text

    def _list(self, given: _Entries, name: str) -> tuple[str, ...] | None:
        if name not in given:
            return None
        key, value = given[name]
        if not isinstance(value, yaml.SequenceNode):
            raise self._wrong(key, f"{name} must be a list")
        return tuple(self._text(each, f"each of {name}") for each in value.value)

    def _parsed(
        self, given: _Entries, name: str, parse_text: Callable[[str], _T], allowed: str
    ) -> _T:
        key, value = given[name]
        text = self._text(value, name)
        try:
            return parse_text(text)
        except ValueError:
            raise self._wrong(
                key, f"{name} must be {allowed}, not {quoted(text)}"
            ) from None

    def _text(self, node: yaml.Node, name: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, f"{name} must be a text")
        text = str(node.value)
        if any("\ud800" <= each <= "\udfff" for each in text):  # YAML accepts "\ud800"
            raise self._wrong(node, f"{name} must be a text without surrogates")
        return text

    # Mappings

    def _known(self, node: yaml.Node | None, name: str, keys: tuple[str, ...]) -> _Entries:
        """Return the entries of a mapping; leave out entries without a value."""
        entries = self._entries(node, name)
        for key, (node_of_key, _) in entries.items():
            if key not in keys:
                raise self._wrong(
                    node_of_key, f"{name} has no {quoted(key)}; it can have {_listed(keys)}"
                )
        return {key: entry for key, entry in entries.items() if not _is_null(entry[1])}

    def _entries(self, node: yaml.Node | None, name: str) -> _Entries:
        if node is None or _is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, f"{name} must be lines of `name: value`")
        entries: _Entries = {}
        for key, value in node.value:
            text = self._text(key, f"a key of {name}")
            if text in entries:
                raise self._wrong(key, f"{name} has {quoted(text)} twice")
            entries[text] = (key, value)
        return entries

    def _wrong(self, node: yaml.Node | None, sentence: str) -> WebConfigError:
        line = f" line {node.start_mark.line + 1}" if node else ""
        return WebConfigError(f"{self._path}{line}: {sentence}")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value in _NULLS


def _listed(words: tuple[str, ...]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _boolean(text: str) -> bool:
    if text.lower() not in _YES + _NO:
        raise ValueError(text)
    return text.lower() in _YES


def _whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def _go_duration_s(text: str) -> float:
    """Parse a duration as Go's time.ParseDuration does, but without a sign."""
    if text == "0":
        return 0.0
    unit = "|".join(sorted(_UNITS_S, key=len, reverse=True))
    part = rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)({unit})"
    if not re.fullmatch(f"(?:{part})+", text):
        raise ValueError(text)
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(part, text))
    if seconds > _LONGEST_S:
        raise ValueError(text)
    return seconds
