# SPDX-License-Identifier: GPL-3.0-only
"""What --web-config has put in force, and what takes its place when the files change."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from tcpexporter.config.reader import Message
from tcpexporter.errors import WebConfigError
from tcpexporter.web.config import WebConfig
from tcpexporter.web.passwords import Checker, Limiter, Users
from tcpexporter.web.tls import Terms, make_terms

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Rules:
    """All that is in force at a time."""

    terms: Terms | None
    headers: Mapping[str, str]
    users: Users | None
    limiter: Limiter | None

    @classmethod
    def of(cls, config: WebConfig, checker: Checker) -> Self:
        return cls(
            terms=make_terms(config.tls) if config.tls else None,
            headers={name.lower(): text for name, text in config.headers.items()},
            users=Users(config.users, checker) if config.users else None,
            limiter=Limiter(config.rate_limit) if config.rate_limit else None,
        )


class Web:
    """How the pages are guarded, as `server` asks for it.

    What is in force is replaced as a whole: a request or connection has begun under the
    old rules or under the new ones, and goes on.
    """

    def __init__(self, path: str, told: Message) -> None:
        """Begin with a configuration.

        Args:
            path: Where it comes from.
            told: What was read there.

        Raises:
            SettingsError: it cannot be used.
        """
        self._path = path
        self._checker = Checker()
        self._rules = self._judge(told)

    def replace(self, told: Message) -> None:
        """Put another configuration into force, from any thread.

        Raises:
            SettingsError: it cannot be used; all is as it was.
        """
        rules = self._judge(told)
        if (rules.terms is None) != (self._rules.terms is None):
            raise WebConfigError(
                f"{self._path}: TLS is turned on or off: restart to have it so"
            )
        self._rules = rules
        log.info("the web configuration has been read again")

    @property
    def terms(self) -> Terms | None:
        """What a new connection is made on; None: without TLS, now and for ever."""
        return self._rules.terms

    @property
    def headers(self) -> Mapping[str, str]:
        """What each response has besides its own headers, in lower case."""
        return self._rules.headers

    async def admit(self, authorization: str, where: str) -> HTTPStatus:
        """Judge a request by its Authorization header: OK, or how it is refused.

        Args:
            authorization: The header's value.
            where: The neighbourhood it came from; they take turns where that takes long.
        """
        rules = self._rules
        if rules.limiter and not rules.limiter.allow():
            return HTTPStatus.TOO_MANY_REQUESTS
        if rules.users is None:
            return HTTPStatus.OK
        return await rules.users.admit(authorization, where)

    def give_up(self) -> None:
        """Have no request wait for a password to be checked any more."""
        self._checker.give_up()

    def _judge(self, told: Message) -> _Rules:
        config = WebConfig.from_json(told.accepted())
        try:
            return _Rules.of(config, self._checker)
        except WebConfigError as error:
            raise WebConfigError(f"{self._path}: {error}") from error
