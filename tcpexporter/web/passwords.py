# SPDX-License-Identifier: GPL-3.0-only
"""Authenticates clients by name and password, and limits the rate of requests.

Checking a password uses 70 ms of CPU time, or more if its hash has a higher cost. So a
correct password is remembered, passwords are checked one after another, and the number of
waiting checks is limited.

The next check is for the source network (`fair_share`) for which fewest checks have started
since the queue was last empty. If more than MAX_WAITING checks wait, one check of the
network with most waiting checks is refused. So a client that tries many passwords delays
the first login of clients in other networks by one check for each network that it uses. It
does not delay their later logins. Whether a password is correct is unknown before its
check. So a user in the attacker's network may be refused and must try again. If checks of
more than MAX_WAITING networks wait, this can happen to any user.
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
"""Maximum number of waiting checks. At 70 ms each, the last one waits for 2.2 seconds."""

MAX_NETWORKS = 4096
"""Maximum number of source networks whose checks are counted; then all counts restart."""

USED_BYTES = 72
"""bcrypt uses only the first 72 bytes of a password, in all programs."""


class CheckQueue:
    """The waiting password checks, by source network."""

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._started = Counter[str]()
        """Checks started since the queue was last empty, by network."""

    def enqueue(self, network: str) -> asyncio.Future[None]:
        """Return a future that is done when the check may start.

        The future is cancelled if the queue is full and this check is chosen to be refused.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(network, deque()).append(turn)
        if sum(map(len, self._waiting.values())) > MAX_WAITING:
            # Among networks with equally many waiting checks, the network that came last.
            most = max(reversed(self._waiting), key=lambda each: len(self._waiting[each]))
            self._remove(most, deque.pop).cancel()
        return turn

    def start_next(self) -> bool:
        """Let the next check start; return False if no check waits."""
        while self._waiting:
            network = min(self._waiting, key=self._started.__getitem__)
            turn = self._remove(network, deque.popleft)
            if not turn.done():
                if len(self._started) > MAX_NETWORKS:
                    self._started.clear()
                self._started[network] += 1
                turn.set_result(None)
                return True
        self._started.clear()
        return False

    def cancel(self) -> None:
        """Cancel all checks that wait."""
        for turn in chain.from_iterable(self._waiting.values()):
            turn.cancel()
        self._waiting.clear()

    def _remove(
        self,
        network: str,
        pop: Callable[[deque[asyncio.Future[None]]], asyncio.Future[None]],
    ) -> asyncio.Future[None]:
        turn = pop(self._waiting[network])
        if not self._waiting[network]:
            del self._waiting[network]
        return turn


class Checker:
    """Checks passwords in a thread, one after another."""

    def __init__(self, check: Callable[[bytes, bytes], bool] = bcrypt.checkpw) -> None:
        """Prepare to check passwords.

        Args:
            check: a function that returns whether a password has a hash. It is slow.
        """
        self._check = check
        self._queue = CheckQueue()
        self._is_busy = False
        self._running: asyncio.Future[bool] | None = None
        self._is_cancelled = False
        self._is_failing = False

    async def matches(self, password: bytes, hashed: bytes, network: str) -> bool | None:
        """Return whether the password has the hash; None: it cannot be checked now.

        Only the first of several failures in a row is logged.

        Raises:
            CancelledError: too many checks wait, or `cancel` was called.
        """
        if self._is_busy:
            await self._queue.enqueue(network)
        self._is_busy = True
        try:
            if self._is_cancelled:
                raise asyncio.CancelledError
            self._running = in_thread(lambda: self._matches(password, hashed))
            matches = await self._running
            self._is_failing = False
        except (NativeCodeError, ThreadError) as error:
            if not self._is_failing:
                log.warning("cannot check passwords: %s", error)
            self._is_failing = True
            return None
        else:
            return matches
        finally:
            self._is_busy = self._queue.start_next()

    def cancel(self) -> None:
        """Cancel the running check and all that wait, and refuse later ones."""
        self._is_cancelled = True
        self._queue.cancel()
        if self._running:
            self._running.cancel()

    def _matches(self, password: bytes, hashed: bytes) -> bool:
        try:
            return self._check(password[:USED_BYTES], hashed)
        except ValueError:  # bcrypt rejects the password, so it is not correct
            return False


class Users:
    """Users and the bcrypt hashes of their passwords."""

    def __init__(self, hashes: Mapping[str, str], checker: Checker) -> None:
        """Accept these users.

        Args:
            hashes: the password hashes, by user name.
            checker: the checker of passwords that are not remembered.
        """
        self._hashes = {name.encode(): text.encode() for name, text in hashes.items()}
        self._checker = checker
        self._unmatchable = _unmatchable_hash(hashes.values())
        self._key = secrets.token_bytes(32)
        self._verified: dict[bytes, bytes] = {}
        """The digests of credentials that were found correct, by user name."""
        self._checking: dict[bytes, asyncio.Future[HTTPStatus]] = {}
        """The running checks, by digest: equal credentials share a check."""

    async def authenticate(self, authorization: str, network: str) -> HTTPStatus:
        """Return OK, or the status of the error response.

        Args:
            authorization: the value of an Authorization header.
            network: the source network of the client.
        """
        credentials = _basic_credentials(authorization)
        if credentials is None:
            return HTTPStatus.UNAUTHORIZED
        name, password = credentials
        # An unknown name is checked too, so that the time does not reveal which names are
        # known.
        digest = self._digest(name, password)
        if hmac.compare_digest(self._verified.get(name, b""), digest):
            return HTTPStatus.OK
        if digest not in self._checking:
            checking = asyncio.ensure_future(self._verify(name, password, digest, network))
            self._checking[digest] = checking
            checking.add_done_callback(lambda _: self._checking.pop(digest))
        shared = self._checking[digest]
        try:
            return await asyncio.shield(shared)
        except asyncio.CancelledError:
            if shared.cancelled():
                return HTTPStatus.SERVICE_UNAVAILABLE
            raise

    async def _verify(
        self, name: bytes, password: bytes, digest: bytes, network: str
    ) -> HTTPStatus:
        known = self._hashes.get(name)
        matches = await self._checker.matches(password, known or self._unmatchable, network)
        if matches is None:
            return HTTPStatus.SERVICE_UNAVAILABLE
        if known is None or not matches:
            return HTTPStatus.UNAUTHORIZED
        self._verified[name] = digest
        return HTTPStatus.OK

    def _digest(self, name: bytes, password: bytes) -> bytes:
        # With the length of the name, "ab" and "c" differ from "a" and "bc".
        data = len(name).to_bytes(8, "big") + name + password
        return hashlib.blake2b(data, key=self._key).digest()


def _unmatchable_hash(hashes: Collection[str]) -> bytes:
    """Return a hash that no password has, with the most common cost in ``hashes``.

    The fifth and sixth characters of a hash are its cost.
    """
    ((cost, _),) = Counter(each[4:6] for each in hashes).most_common(1)
    return f"$2b${cost}${'.' * 53}".encode()


def _basic_credentials(authorization: str) -> tuple[bytes, bytes] | None:
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
    """A token bucket: each request removes a token; a token is added every interval."""

    def __init__(
        self, limit: RateLimit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start with a full bucket.

        Args:
            limit: the size of the bucket, and the interval.
            clock: a function that returns the time in seconds.
        """
        self._limit = limit
        self._clock = clock
        self._tokens = float(limit.burst)
        self._updated_s = clock()

    def allow(self) -> bool:
        """Remove a token from the bucket; return False if the bucket is empty."""
        now_s = self._clock()
        added = (now_s - self._updated_s) / self._limit.interval_s
        self._tokens = min(self._limit.burst, self._tokens + added)
        self._updated_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
