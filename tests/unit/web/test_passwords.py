# SPDX-License-Identifier: GPL-3.0-only
"""Authentication and the rate limit; tests count checks and requests instead of seconds."""

import asyncio
import base64
import threading
from http import HTTPStatus

import bcrypt
import pytest

from tcpexporter.web.config import RateLimit
from tcpexporter.web.passwords import MAX_WAITING, Checker, Limiter, Users

HERE, THERE = "192.0.2.1", "198.51.100.7"
OK, UNAUTHORIZED = HTTPStatus.OK, HTTPStatus.UNAUTHORIZED
ALICES, BOBS = (bcrypt.hashpw(each, bcrypt.gensalt(4)).decode() for each in (b"a", b"b"))


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class Checks:
    """bcrypt's check, which records its arguments and waits for ``go_on``."""

    def __init__(self) -> None:
        self.made: list[tuple[bytes, bytes]] = []
        self.running = 0
        self.most_running = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        self.made.append((password, hashed))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        assert self.go_on.wait(10)
        self.running -= 1
        return bcrypt.checkpw(password, hashed)


def judge(users: Users, *authorizations: str) -> list[HTTPStatus]:
    """Return the results of concurrent requests."""

    async def ask() -> list[HTTPStatus]:
        return await asyncio.gather(
            *(users.authenticate(each, HERE) for each in authorizations)
        )

    return asyncio.run(ask())


def make(checks: Checks, **hashes: str) -> Users:
    return Users(hashes or {"alice": ALICES, "bob": BOBS}, Checker(checks))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (basic("alice", "a"), OK),
        (basic("bob", "b"), OK),
        (basic("alice", "b"), UNAUTHORIZED),
        (basic("alice", ""), UNAUTHORIZED),
        (basic("eve", "a"), UNAUTHORIZED),
        (basic("", ""), UNAUTHORIZED),
        (basic("ALICE", "a"), UNAUTHORIZED),
        (basic("alice", "a\0"), UNAUTHORIZED),
        (basic("alice", "a" * 200), UNAUTHORIZED),
        (basic("alice", "a").replace("Basic", "bASIC"), OK),
        (basic("alice", "a").replace("Basic", "Bearer"), UNAUTHORIZED),
        ("", UNAUTHORIZED),
        ("Basic", UNAUTHORIZED),
        ("Basic !!!", UNAUTHORIZED),
        ("Basic é", UNAUTHORIZED),
        ("Basic " + base64.b64encode(b"alice").decode(), UNAUTHORIZED),
        ("Basic " + base64.b64encode(b"\xff\xfe:a").decode(), UNAUTHORIZED),
    ],
)
def test_only_a_known_name_with_its_password_is_accepted(
    authorization: str, status: HTTPStatus
) -> None:
    """Other names, passwords and schemes, and invalid headers, are refused."""
    assert judge(make(Checks()), authorization) == [status]


def test_the_first_72_bytes_of_a_password_count() -> None:
    """Programs that make bcrypt hashes use 72 bytes too."""
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert judge(make(Checks(), long=hashed), basic("long", "x" * 80)) == [OK]
    assert judge(make(Checks(), long=hashed), basic("long", "x" * 71)) == [UNAUTHORIZED]


def test_a_correct_password_is_checked_once() -> None:
    """Later requests need no check, also after failed attempts for this or other names."""
    checks = Checks()
    users = make(checks)
    for _ in range(5):
        assert judge(users, basic("alice", "a")) == [OK]
    assert len(checks.made) == 1
    assert judge(users, *(basic("eve", str(each)) for each in range(10)))
    assert judge(users, basic("alice", "wrong")) == [UNAUTHORIZED]
    checks.made.clear()
    assert judge(users, basic("alice", "a")) == [OK]
    assert checks.made == []


def test_unknown_names_are_checked_like_users() -> None:
    """An unknown name causes the same number of checks, of a hash with the same cost."""
    checks = Checks()
    users = make(checks)
    for name in ("alice", "eve"):
        for _ in range(3):
            assert judge(users, basic(name, "wrong")) == [UNAUTHORIZED]
    known, unknown = checks.made[:3], checks.made[3:]
    assert len(unknown) == len(known)
    assert {hashed[:7] for _, hashed in unknown} == {hashed[:7] for _, hashed in known}


def test_the_hash_for_unknown_names_has_the_most_common_cost() -> None:
    """With hashes of several costs, an unknown name costs as much as most users."""
    checks = Checks()
    cheap, usual = ALICES, ALICES.replace("$04$", "$05$")
    judge(make(checks, a=usual, b=cheap, c=usual), basic("eve", "x"))
    ((_, hashed),) = checks.made
    assert hashed.startswith(b"$2b$05$")


def test_remembered_credentials_are_not_confused() -> None:
    """Another split of the same characters into name and password is refused."""
    users = make(Checks(), ab=ALICES, a=BOBS)
    assert judge(users, basic("ab", "a")) == [OK]
    assert judge(users, basic("a", "ba"), basic("ab" + ALICES, "a")) == [UNAUTHORIZED] * 2


def test_equal_credentials_share_a_check() -> None:
    """150 concurrent requests with the correct password and 150 with a wrong one."""
    checks = Checks()
    correct, wrong = basic("alice", "a"), basic("alice", "wrong")
    assert judge(make(checks), *([correct, wrong] * 150)) == [OK, UNAUTHORIZED] * 150
    assert len(checks.made) == 2


def test_one_check_runs_at_a_time_and_the_queue_is_limited() -> None:
    """Trying many passwords uses one CPU; requests beyond the queue get 503."""
    checks = Checks()
    tried = [basic("eve", str(each)) for each in range(1 + MAX_WAITING + 7)]
    statuses = judge(make(checks), *tried)
    assert statuses.count(UNAUTHORIZED) == 1 + MAX_WAITING == len(checks.made)
    assert statuses[-7:] == [HTTPStatus.SERVICE_UNAVAILABLE] * 7
    assert checks.most_running == 1


async def authenticate_in_order(
    users: Users, checks: Checks, *requests: tuple[str, str]
) -> list[HTTPStatus]:
    """Enqueue requests (credentials, network) one by one, then let the checks run."""
    checks.go_on.clear()
    waiting = []
    for authorization, network in requests:
        waiting.append(asyncio.ensure_future(users.authenticate(authorization, network)))
        await asyncio.sleep(0.01)
    checks.go_on.set()
    return await asyncio.gather(*waiting)


def test_other_networks_do_not_wait_for_all_attempts_of_one() -> None:
    """A request of another network replaces an attempt in the queue, and waits for one
    or two checks."""
    checks = Checks()
    attempts = [(basic("eve", str(each)), THERE) for each in range(1 + MAX_WAITING)]
    requests = [*attempts, (basic("alice", "a"), HERE), (basic("bob", "b"), HERE)]
    statuses = asyncio.run(authenticate_in_order(make(checks), checks, *requests))
    refused = HTTPStatus.SERVICE_UNAVAILABLE
    assert statuses == [*[UNAUTHORIZED] * (len(attempts) - 2), refused, refused, OK, OK]
    passwords = [password for password, _ in checks.made]
    assert passwords[:6] == [b"0", b"1", b"a", b"2", b"b", b"3"]


def test_the_network_with_fewest_checks_is_next() -> None:
    """Attempts from five addresses delay a request of a sixth by one or two checks."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        attempts = [
            asyncio.ensure_future(
                users.authenticate(basic("eve", str(each)), f"192.0.2.{each % 5}")
            )
            for each in range(21)
        ]
        while len(checks.made) < 11:
            await asyncio.sleep(0)
        before = len(checks.made)
        assert await users.authenticate(basic("alice", "a"), THERE) == OK
        passwords = [password for password, _ in checks.made]
        assert b"a" in passwords[before : before + 2]
        await asyncio.gather(*attempts)

    asyncio.run(run())


def test_each_of_many_networks_has_one_queue_entry() -> None:
    """The first requests stay in the queue when it is full."""
    checks = Checks()
    requests = [
        (basic("eve", str(each)), f"192.0.2.{each}") for each in range(MAX_WAITING + 3)
    ]
    statuses = asyncio.run(authenticate_in_order(make(checks), checks, *requests))
    assert statuses[-2:] == [HTTPStatus.SERVICE_UNAVAILABLE] * 2
    assert statuses.count(UNAUTHORIZED) == 1 + MAX_WAITING


def test_the_event_loop_runs_during_a_check() -> None:
    """Remembered credentials are accepted while others are being checked."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        assert await users.authenticate(basic("alice", "a"), HERE) == OK
        checks.go_on.clear()
        unknown = asyncio.ensure_future(users.authenticate(basic("eve", "x"), HERE))
        while not checks.running:
            await asyncio.sleep(0.01)
        assert await users.authenticate(basic("alice", "a"), HERE) == OK
        assert not unknown.done()
        checks.go_on.set()
        assert await unknown == UNAUTHORIZED

    asyncio.run(run())


def test_a_cancelled_request_does_not_cancel_the_check_it_shares() -> None:
    """Two requests share a check; one is cancelled, the other gets the result."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        checks.go_on.clear()
        first = asyncio.ensure_future(users.authenticate(basic("alice", "a"), HERE))
        second = asyncio.ensure_future(users.authenticate(basic("alice", "a"), HERE))
        while not checks.running:
            await asyncio.sleep(0.01)
        first.cancel()
        checks.go_on.set()
        assert await second == OK

    asyncio.run(run())


def test_cancelling_the_checker_refuses_all_requests() -> None:
    """This includes the request whose check is running, and those in the queue."""
    checks = Checks()
    checker = Checker(checks)
    users = Users({"alice": ALICES}, checker)

    async def run() -> list[HTTPStatus]:
        checks.go_on.clear()
        tried = (basic("alice", each) for each in ("a", "b", "c"))
        waiting = asyncio.gather(*(users.authenticate(each, HERE) for each in tried))
        while not checks.running:
            await asyncio.sleep(0.01)
        checker.cancel()
        return await waiting

    assert asyncio.run(run()) == [HTTPStatus.SERVICE_UNAVAILABLE] * 3
    checks.go_on.set()
    assert len(checks.made) == 1


class Panic(BaseException):
    """Replaces pyo3's class for Rust panics, which is not an Exception."""


@pytest.mark.parametrize("fault", [Panic("at its end"), MemoryError()])
def test_a_failing_check_does_not_block_later_ones(
    fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is refused for now, one line is logged, and the next check works."""
    faults = [fault] * 3

    def check(password: bytes, hashed: bytes) -> bool:
        if faults:
            raise faults.pop()
        return bcrypt.checkpw(password, hashed)

    users = Users({"alice": ALICES}, Checker(check))
    tried = (basic("alice", each) for each in ("a", "b", "c"))
    assert judge(users, *tried) == [HTTPStatus.SERVICE_UNAVAILABLE] * 3
    assert judge(users, basic("alice", "a")) == [OK]
    (message,) = caplog.messages
    assert message.startswith("cannot check passwords: ")


def test_without_threads_requests_are_refused_for_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel allows no more threads: 503, one logged line, no traceback."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    users = make(Checks())
    with monkeypatch.context() as changed:
        changed.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            assert judge(users, basic("alice", "a")) == [HTTPStatus.SERVICE_UNAVAILABLE]
    assert judge(users, basic("alice", "a")) == [OK]
    (message,) = caplog.messages
    assert "cannot check passwords: no thread can be started: raise" in message


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def allowed(limiter: Limiter, asked: int) -> int:
    return sum(limiter.allow() for _ in range(asked))


def test_a_burst_is_allowed_and_then_one_request_each_interval() -> None:
    """The bucket starts full, gets one token each interval, and never exceeds its size."""
    clock = Clock()
    limiter = Limiter(RateLimit(interval_s=2.0, burst=3), clock)
    assert allowed(limiter, 10) == 3
    clock.now_s += 1.0
    assert allowed(limiter, 10) == 0
    clock.now_s += 1.0
    assert allowed(limiter, 10) == 1
    clock.now_s += 100.0
    assert allowed(limiter, 10) == 3


def test_a_burst_of_0_allows_no_request() -> None:
    """The test of exporter-toolkit requires this."""
    clock = Clock()
    limiter = Limiter(RateLimit(interval_s=1.0, burst=0), clock)
    clock.now_s += 100.0
    assert allowed(limiter, 10) == 0
