# SPDX-License-Identifier: GPL-3.0-only
"""Who may ask: passwords, and how often.

A password takes a CPU 70 ms to check, or whatever its hash was made to cost. So a right
one is remembered, wrong ones are checked one after another, and only so many wait.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus

import bcrypt

from tcpexporter.foreign import in_thread
from tcpexporter.webconfig import RateLimit

MAX_WAITING = 16
"""Passwords that wait to be checked, or are; at 70 ms each the last waits for a second."""

USED_BYTES = 72
"""What bcrypt uses of a password, here as elsewhere."""


class Checker:
    """Checks passwords, one after another, while the event loop goes on."""

    def __init__(self, check: Callable[[bytes, bytes], bool] = bcrypt.checkpw) -> None:
        """Begin with none.

        Args:
            check: Whether a password has a hash; may take long.
        """
        self._check = check
        self._turn = asyncio.Lock()
        self._at_work: asyncio.Future[bool] | None = None
        self._given_up = False

    async def matches(self, password: bytes, hashed: bytes) -> bool:
        """Whether it does; cancelled when given up."""
        async with self._turn:
            if self._given_up:
                raise asyncio.CancelledError
            self._at_work = in_thread(lambda: self._matches(password, hashed))
            return await self._at_work

    def give_up(self) -> None:
        """Have nobody wait any more, as the end has come."""
        self._given_up = True
        if self._at_work:
            self._at_work.cancel()

    def _matches(self, password: bytes, hashed: bytes) -> bool:
        try:
            return self._check(password[:USED_BYTES], hashed)
        except ValueError:  # what bcrypt does not take cannot be right
            return False


class Users:
    """Names and the hashes of their passwords."""

    def __init__(self, hashes: Mapping[str, str], checker: Checker) -> None:
        """Know these, by name, and no others."""
        self._hashes = {name.encode(): text.encode() for name, text in hashes.items()}
        self._checker = checker
        self._nobodys = _nobodys_hash(hashes.values())
        self._key = secrets.token_bytes(32)
        self._right: dict[bytes, bytes] = {}
        """By name, the digest of what was right: at most one for each."""
        self._waiting: dict[bytes, asyncio.Future[bool]] = {}
        """By digest: who asks the same waits for the same."""

    async def admit(self, authorization: str) -> HTTPStatus:
        """Judge the value of an Authorization header: OK, or how it is refused."""
        credentials = _basic(authorization)
        if credentials is None:
            return HTTPStatus.UNAUTHORIZED
        name, password = credentials
        # Who is not known is checked like everybody else, so that nobody learns who is.
        digest = self._digest(name, password)
        if hmac.compare_digest(self._right.get(name, b""), digest):
            return HTTPStatus.OK
        if digest not in self._waiting:
            if len(self._waiting) >= MAX_WAITING:
                return HTTPStatus.SERVICE_UNAVAILABLE
            judging = asyncio.ensure_future(self._judge(name, password, digest))
            self._waiting[digest] = judging
            judging.add_done_callback(lambda _: self._waiting.pop(digest))
        checking = self._waiting[digest]
        try:
            right = await asyncio.shield(checking)
        except asyncio.CancelledError:
            if checking.cancelled():
                return HTTPStatus.SERVICE_UNAVAILABLE
            raise
        return HTTPStatus.OK if right else HTTPStatus.UNAUTHORIZED

    async def _judge(self, name: bytes, password: bytes, digest: bytes) -> bool:
        known = self._hashes.get(name)
        matches = await self._checker.matches(password, known or self._nobodys)
        right = known is not None and matches
        if right:
            self._right[name] = digest
        return right

    def _digest(self, name: bytes, password: bytes) -> bytes:
        # The name's length keeps "ab" with "c" from being "a" with "bc".
        told = len(name).to_bytes(8, "big") + name + password
        return hashlib.blake2b(told, key=self._key).digest()


def _nobodys_hash(hashes: Collection[str]) -> bytes:
    """One that no password has, as costly as most of these: the fourth to sixth byte."""
    ((cost, _),) = Counter(each[4:6] for each in hashes).most_common(1)
    return f"$2b${cost}${'.' * 53}".encode()


def _basic(authorization: str) -> tuple[bytes, bytes] | None:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    name, colon, password = decoded.partition(b":")
    return (name, password) if colon else None


class Limiter:
    """A bucket of requests: each takes one, and one comes back every interval."""

    def __init__(
        self, limit: RateLimit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with a full bucket.

        Args:
            limit: Its size, and the interval.
            clock: In seconds.
        """
        self._limit = limit
        self._clock = clock
        self._left = float(limit.burst)
        self._seen_s = clock()

    def allow(self) -> bool:
        """Take one, if there is one."""
        now_s = self._clock()
        back = (now_s - self._seen_s) / self._limit.interval_s
        self._left = min(self._limit.burst, self._left + back)
        self._seen_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
