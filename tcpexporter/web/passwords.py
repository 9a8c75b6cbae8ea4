# SPDX-License-Identifier: GPL-3.0-only
"""Who may ask: passwords, and how often.

A password takes a CPU 70 ms to check, or whatever its hash was made to cost. So a right
one is remembered, wrong ones are checked one after another, and only so many wait.

Of those who wait the next is from where fewest have been checked lately, and who is turned
away is from where most wait (`places.neighbourhood`). So a stranger with many passwords
delays the first login of somebody elsewhere by a check for each address of theirs at most,
and later ones not at all. Among those at the same address, or at more addresses than may
wait, the right password cannot be told before it is checked: whoever has it may have to try
again.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from itertools import chain

import bcrypt

from tcpexporter.errors import NativeCodeError, ThreadError
from tcpexporter.host.daemon_threads import in_thread
from tcpexporter.web.config import RateLimit

log = logging.getLogger(__name__)

MAX_WAITING = 32
"""Passwords that wait to be checked; at 70 ms each the last waits for two seconds."""

MAX_REMEMBERED = 4096
"""Neighbourhoods of which it is known how often they have had a turn."""

USED_BYTES = 72
"""What bcrypt uses of a password, here as elsewhere."""


class Turns:
    """Those who wait for a turn, by neighbourhood."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._had = Counter[str]()
        """Turns since somebody began to wait."""

    def join(self, where: str) -> asyncio.Future[None]:
        """Done when it is one's turn, or cancelled: somebody had to go."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(where, deque()).append(turn)
        if sum(map(len, self._waiting.values())) > MAX_WAITING:
            # Of several that are as many, those who came last.
            most = max(reversed(self._waiting), key=lambda each: len(self._waiting[each]))
            self._take(most, deque.pop).cancel()
        return turn

    def call(self) -> bool:
        """Have the next one begin; whether there is one."""
        while self._waiting:
            where = min(self._waiting, key=self._had.__getitem__)
            turn = self._take(where, deque.popleft)
            if not turn.done():
                if len(self._had) > MAX_REMEMBERED:
                    self._had.clear()
                self._had[where] += 1
                turn.set_result(None)
                return True
        self._had.clear()
        return False

    def cancel(self) -> None:
        """Turn all away."""
        for turn in chain.from_iterable(self._waiting.values()):
            turn.cancel()
        self._waiting.clear()

    def _take(
        self,
        where: str,
        take: Callable[[deque[asyncio.Future[None]]], asyncio.Future[None]],
    ) -> asyncio.Future[None]:
        taken = take(self._waiting[where])
        if not self._waiting[where]:
            del self._waiting[where]
        return taken


class Checker:
    """Checks passwords, one after another, while the event loop goes on."""

    def __init__(self, check: Callable[[bytes, bytes], bool] = bcrypt.checkpw) -> None:
        """Begin with none.

        Args:
            check: Whether a password has a hash; may take long.
        """
        self._check = check
        self._turns = Turns()
        self._is_busy = False
        self._at_work: asyncio.Future[bool] | None = None
        self._given_up = False
        self._is_failing = False

    async def matches(self, password: bytes, hashed: bytes, where: str) -> bool | None:
        """Whether it does; None: it cannot be checked now, which is logged once.

        Cancelled when given up, or when too many wait.
        """
        if self._is_busy:
            await self._turns.join(where)
        self._is_busy = True
        try:
            if self._given_up:
                raise asyncio.CancelledError
            self._at_work = in_thread(lambda: self._matches(password, hashed))
            right = await self._at_work
            self._is_failing = False
        except (NativeCodeError, ThreadError) as error:
            if not self._is_failing:
                log.warning("passwords cannot be checked: %s", error)
            self._is_failing = True
            return None
        else:
            return right
        finally:
            self._is_busy = self._turns.call()

    def give_up(self) -> None:
        """Have nobody wait any more, as the end has come."""
        self._given_up = True
        self._turns.cancel()
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
        self._waiting: dict[bytes, asyncio.Future[HTTPStatus]] = {}
        """By digest: who asks the same waits for the same."""

    async def admit(self, authorization: str, where: str) -> HTTPStatus:
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
            judging = asyncio.ensure_future(self._judge(name, password, digest, where))
            self._waiting[digest] = judging
            judging.add_done_callback(lambda _: self._waiting.pop(digest))
        checking = self._waiting[digest]
        try:
            return await asyncio.shield(checking)
        except asyncio.CancelledError:
            if checking.cancelled():
                return HTTPStatus.SERVICE_UNAVAILABLE
            raise

    async def _judge(
        self, name: bytes, password: bytes, digest: bytes, where: str
    ) -> HTTPStatus:
        known = self._hashes.get(name)
        matches = await self._checker.matches(password, known or self._nobodys, where)
        if matches is None:
            return HTTPStatus.SERVICE_UNAVAILABLE
        if known is None or not matches:
            return HTTPStatus.UNAUTHORIZED
        self._right[name] = digest
        return HTTPStatus.OK

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
