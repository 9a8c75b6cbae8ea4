# SPDX-License-Identifier: GPL-3.0-only
"""Holds the web configuration in force (TLS, headers, users, rate limit) and applies it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

from tcpexporter.errors import WebConfigError
from tcpexporter.web.config import WebConfig
from tcpexporter.web.passwords import Checker, Limiter, Users
from tcpexporter.web.tls import TlsPolicy, make_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Rules:
    """The TLS policy, headers, users and rate limit of one web configuration."""

    tls_policy: TlsPolicy | None
    headers: Mapping[str, str]
    users: Users | None
    limiter: Limiter | None

    @classmethod
    def of(cls, config: WebConfig, checker: Checker) -> Self:
        return cls(
            tls_policy=make_policy(config.tls) if config.tls else None,
            headers={name.lower(): text for name, text in config.headers.items()},
            users=Users(config.users, checker) if config.users else None,
            limiter=Limiter(config.rate_limit) if config.rate_limit else None,
        )


class Guard:
    """Authorizes requests by the web configuration in force.

    A new configuration replaces the whole old one. A connection keeps the TLS policy that
    it began with. Each request on it is authorized by the configuration then in force.
    """

    def __init__(self, path: str, config: Mapping[str, Any]) -> None:
        """Apply the first configuration.

        Args:
            path: the file of the configuration, for error messages.
            config: the configuration, as `WebConfig.from_json` requires it.

        Raises:
            SettingsError: the configuration cannot be used.
        """
        self._path = path
        self._checker = Checker()
        self._rules = self._make_rules(config)

    def replace(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration in force. Any thread may call this.

        Raises:
            SettingsError: the new configuration cannot be used; the old one stays in force.
        """
        rules = self._make_rules(config)
        if (rules.tls_policy is None) != (self._rules.tls_policy is None):
            raise WebConfigError(
                f"{self._path}: turning TLS on or off requires a restart of the exporter"
            )
        self._rules = rules
        log.info("web configuration reloaded")

    @property
    def tls_policy(self) -> TlsPolicy | None:
        """The TLS policy for new connections; None: no TLS until the next restart."""
        return self._rules.tls_policy

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers to add to each response, with names in lower case."""
        return self._rules.headers

    async def authorize(self, authorization: str, network: str) -> HTTPStatus:
        """Return OK if a request is authorized; otherwise the status of the error response.

        Args:
            authorization: the value of the Authorization header.
            network: the source network of the client. If several passwords wait to be
                checked, the networks take turns.
        """
        rules = self._rules
        if rules.limiter and not rules.limiter.allow():
            return HTTPStatus.TOO_MANY_REQUESTS
        if rules.users is None:
            return HTTPStatus.OK
        return await rules.users.authenticate(authorization, network)

    def cancel_checks(self) -> None:
        """Cancel the running and the waiting password checks, and refuse later ones."""
        self._checker.cancel()

    def _make_rules(self, config: Mapping[str, Any]) -> _Rules:
        try:
            return _Rules.of(WebConfig.from_json(config), self._checker)
        except WebConfigError as error:
            raise WebConfigError(f"{self._path}: {error}") from error
