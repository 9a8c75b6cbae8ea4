# SPDX-License-Identifier: GPL-3.0-only
"""What the web configuration of Prometheus' exporters says, as one frozen `WebConfig`."""

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
"""Of TLS 1.2 and before: Go's names, in its order of preference, and OpenSSL's."""


@dataclass(frozen=True)
class Tls:
    """How connections are encrypted, with the content of every file."""

    cert: str
    """PEM, as all of them."""
    key: str
    client_ca: str | None = None
    client_auth_type: str = NO_CERTIFICATE
    client_allowed_sans: tuple[str, ...] | None = None
    """None: whatever a client's certificate is for."""
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    """Go's names; empty: all that it has."""
    prefer_server_cipher_suites: bool = True
    curve: str | None = None
    """OpenSSL's name; None: its own choice."""


@dataclass(frozen=True)
class RateLimit:
    """A bucket of so many requests, to which one comes back every interval."""

    interval_s: float
    burst: int


@dataclass(frozen=True)
class WebConfig:
    """How the pages are guarded."""

    tls: Tls | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict)
    """Names, and bcrypt hashes of their passwords."""
    rate_limit: RateLimit | None = None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` and JSON have made of one."""
        tls, rate_limit = told["tls"], told["rate_limit"]
        if tls:
            for name in ("cipher_suites", "client_allowed_sans"):
                tls[name] = None if tls[name] is None else tuple(tls[name])
        return cls(
            tls=Tls(**tls) if tls else None,
            headers=told["headers"],
            users=told["users"],
            rate_limit=RateLimit(**rate_limit) if rate_limit else None,
        )
