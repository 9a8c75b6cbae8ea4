# SPDX-License-Identifier: GPL-3.0-only
"""Defines the parsed web configuration (--web-config): one frozen `WebConfig`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

NO_CERTIFICATE = "NoClientCert"
VERIFIED_IF_GIVEN = "VerifyClientCertIfGiven"
VERIFIED = "RequireAndVerifyClientCert"

CIPHERS = {
    f"TLS_ECDHE_{kind}_WITH_{go}": f"ECDHE-{kind}-{openssl}"
    for kind in ("ECDSA", "RSA")
    for go, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
    )
}
"""OpenSSL's name for Go's name of cipher suites up to TLS 1.2, in Go's preferred order."""


@dataclass(frozen=True)
class Tls:
    """The section tls_server_config, with the content of the files that it names."""

    cert: str
    """The certificate, in PEM. ``key`` and ``client_ca`` are in PEM too."""
    key: str
    client_ca: str | None = None
    client_auth_type: str = NO_CERTIFICATE
    client_allowed_sans: tuple[str, ...] | None = None
    """Allowed names in client certificates; None: any name."""
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    """Go's names of cipher suites; empty: all suites of Go."""
    prefer_server_cipher_suites: bool = True
    curve: str | None = None
    """OpenSSL's name of the curve; None: OpenSSL chooses."""


@dataclass(frozen=True)
class RateLimit:
    """The section rate_limit: a bucket of ``burst`` tokens, with one more per interval."""

    interval_s: float
    burst: int


@dataclass(frozen=True)
class WebConfig:
    """All sections of a web configuration."""

    tls: Tls | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict)
    """bcrypt hashes of passwords, by user name."""
    rate_limit: RateLimit | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the `WebConfig` that `dataclasses.asdict` has converted to JSON."""
        tls, rate_limit = content["tls"], content["rate_limit"]
        if tls:
            for name in ("cipher_suites", "client_allowed_sans"):
                tls[name] = None if tls[name] is None else tuple(tls[name])
        return cls(
            tls=Tls(**tls) if tls else None,
            headers=content["headers"],
            users=content["users"],
            rate_limit=RateLimit(**rate_limit) if rate_limit else None,
        )
