# SPDX-License-Identifier: GPL-3.0-only
"""Passwords and limits: counted in checks and requests, not in seconds."""

import asyncio
import base64
import threading
from http import HTTPStatus

import bcrypt
import pytest

from tcpexporter.web import passwords as access
from tcpexporter.web.config import RateLimit
from tcpexporter.web.passwords import Checker, Limiter, Users

HERE, THERE = "192.0.2.1", "198.51.100.7"
OK, UNAUTHORIZED = HTTPStatus.OK, HTTPStatus.UNAUTHORIZED
ALICES, BOBS = (bcrypt.hashpw(each, bcrypt.gensalt(4)).decode() for each in (b"a", b"b"))


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class Checks:
    """bcrypt's own, noting what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes]] = []
        self.at_work = 0
        self.most_at_work = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        self.asked.append((password, hashed))
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        assert self.go_on.wait(10)
        self.at_work -= 1
        return bcrypt.checkpw(password, hashed)


def judge(users: Users, *authorizations: str) -> list[HTTPStatus]:
    """All asked at once."""

    async def ask() -> list[HTTPStatus]:
        return await asyncio.gather(*(users.admit(each, HERE) for each in authorizations))

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
def test_who_is_admitted(authorization: str, status: HTTPStatus) -> None:
    """A known name with its password, and nothing else."""
    assert judge(make(Checks()), authorization) == [status]


def test_a_long_password_counts_for_what_bcrypt_uses() -> None:
    """72 bytes, as everywhere that hashes it."""
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert judge(make(Checks(), long=hashed), basic("long", "x" * 80)) == [OK]
    assert judge(make(Checks(), long=hashed), basic("long", "x" * 71)) == [UNAUTHORIZED]


def test_a_right_password_is_checked_once() -> None:
    """Later scrapes cost nothing, whoever else tries what in between."""
    checks = Checks()
    users = make(checks)
    for _ in range(5):
        assert judge(users, basic("alice", "a")) == [OK]
    assert len(checks.asked) == 1
    assert judge(users, *(basic("eve", str(each)) for each in range(10)))
    assert judge(users, basic("alice", "wrong")) == [UNAUTHORIZED]
    checks.asked.clear()
    assert judge(users, basic("alice", "a")) == [OK]
    assert checks.asked == []


def test_others_are_checked_like_users() -> None:
    """A name that is not known takes as many checks, of a hash that costs the same."""
    checks = Checks()
    users = make(checks)
    for name in ("alice", "eve"):
        for _ in range(3):
            assert judge(users, basic(name, "wrong")) == [UNAUTHORIZED]
    ours, others = checks.asked[:3], checks.asked[3:]
    assert len(others) == len(ours)
    assert {hashed[:7] for _, hashed in others} == {hashed[:7] for _, hashed in ours}


def test_the_stand_in_costs_what_most_do() -> None:
    """With hashes of several costs an unknown name costs as most users."""
    checks = Checks()
    cheap, usual = ALICES, ALICES.replace("$04$", "$05$")
    judge(make(checks, a=usual, b=cheap, c=usual), basic("eve", "x"))
    ((_, hashed),) = checks.asked
    assert hashed.startswith(b"$2b$05$")


def test_what_is_remembered_cannot_be_mixed_up() -> None:
    """No other way of putting name and password together is the same."""
    users = make(Checks(), ab=ALICES, a=BOBS)
    assert judge(users, basic("ab", "a")) == [OK]
    assert judge(users, basic("a", "ba"), basic("ab" + ALICES, "a")) == [UNAUTHORIZED] * 2


def test_as_many_as_come_with_the_same_are_one_check() -> None:
    """150 scrapes at once with the right password, and 150 with one wrong one."""
    checks = Checks()
    right, wrong = basic("alice", "a"), basic("alice", "wrong")
    assert judge(make(checks), *([right, wrong] * 150)) == [OK, UNAUTHORIZED] * 150
    assert len(checks.asked) == 2


def test_checks_are_made_one_after_another_and_only_so_many_wait() -> None:
    """A stranger with many passwords takes one CPU; who comes on top is told to wait."""
    checks = Checks()
    tried = [basic("eve", str(each)) for each in range(1 + access.MAX_WAITING + 7)]
    statuses = judge(make(checks), *tried)
    assert statuses.count(UNAUTHORIZED) == 1 + access.MAX_WAITING == len(checks.asked)
    assert statuses[-7:] == [HTTPStatus.SERVICE_UNAVAILABLE] * 7
    assert checks.most_at_work == 1


async def stand_in_line(
    users: Users, checks: Checks, *asking: tuple[str, str]
) -> list[HTTPStatus]:
    """Who asks where; each is there before the next one comes, and nobody's turn before."""
    checks.go_on.clear()
    waiting = []
    for authorization, where in asking:
        waiting.append(asyncio.ensure_future(users.admit(authorization, where)))
        await asyncio.sleep(0.01)
    checks.go_on.set()
    return await asyncio.gather(*waiting)


def test_others_do_not_wait_for_all_that_a_stranger_tries() -> None:
    """Whoever comes from elsewhere waits for a check or two, and takes another's place."""
    checks = Checks()
    crowd = [(basic("eve", str(each)), THERE) for each in range(1 + access.MAX_WAITING)]
    line = [*crowd, (basic("alice", "a"), HERE), (basic("bob", "b"), HERE)]
    statuses = asyncio.run(stand_in_line(make(checks), checks, *line))
    refused = HTTPStatus.SERVICE_UNAVAILABLE
    assert statuses == [*[UNAUTHORIZED] * (len(crowd) - 2), refused, refused, OK, OK]
    passwords = [password for password, _ in checks.asked]
    assert passwords[:6] == [b"0", b"1", b"a", b"2", b"b", b"3"]


def test_who_has_had_few_turns_has_the_next() -> None:
    """However many addresses a stranger has, others wait for a check or two."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        crowd = [
            asyncio.ensure_future(
                users.admit(basic("eve", str(each)), f"192.0.2.{each % 5}")
            )
            for each in range(21)
        ]
        while len(checks.asked) < 11:
            await asyncio.sleep(0)
        before = len(checks.asked)
        assert await users.admit(basic("alice", "a"), THERE) == OK
        passwords = [password for password, _ in checks.asked]
        assert b"a" in passwords[before : before + 2]
        await asyncio.gather(*crowd)

    asyncio.run(run())


def test_more_neighbourhoods_than_may_wait() -> None:
    """With one in each, those who came first stay."""
    checks = Checks()
    line = [
        (basic("eve", str(each)), f"192.0.2.{each}")
        for each in range(access.MAX_WAITING + 3)
    ]
    statuses = asyncio.run(stand_in_line(make(checks), checks, *line))
    assert statuses[-2:] == [HTTPStatus.SERVICE_UNAVAILABLE] * 2
    assert statuses.count(UNAUTHORIZED) == 1 + access.MAX_WAITING


def test_the_event_loop_goes_on_meanwhile() -> None:
    """And who is known already is admitted while a stranger is being checked."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        assert await users.admit(basic("alice", "a"), HERE) == OK
        checks.go_on.clear()
        stranger = asyncio.ensure_future(users.admit(basic("eve", "x"), HERE))
        while not checks.at_work:
            await asyncio.sleep(0.01)
        assert await users.admit(basic("alice", "a"), HERE) == OK
        assert not stranger.done()
        checks.go_on.set()
        assert await stranger == UNAUTHORIZED

    asyncio.run(run())


def test_who_gives_up_does_not_take_others_along() -> None:
    """Of two that wait for the same, one is cancelled; the other gets its answer."""
    checks = Checks()
    users = make(checks)

    async def run() -> None:
        checks.go_on.clear()
        first = asyncio.ensure_future(users.admit(basic("alice", "a"), HERE))
        second = asyncio.ensure_future(users.admit(basic("alice", "a"), HERE))
        while not checks.at_work:
            await asyncio.sleep(0.01)
        first.cancel()
        checks.go_on.set()
        assert await second == OK

    asyncio.run(run())


def test_nobody_waits_when_given_up() -> None:
    """Neither for the one that is at work nor for a turn."""
    checks = Checks()
    checker = Checker(checks)
    users = Users({"alice": ALICES}, checker)

    async def run() -> list[HTTPStatus]:
        checks.go_on.clear()
        tried = (basic("alice", each) for each in ("a", "b", "c"))
        waiting = asyncio.gather(*(users.admit(each, HERE) for each in tried))
        while not checks.at_work:
            await asyncio.sleep(0.01)
        checker.give_up()
        return await waiting

    assert asyncio.run(run()) == [HTTPStatus.SERVICE_UNAVAILABLE] * 3
    checks.go_on.set()
    assert len(checks.asked) == 1


class Panic(BaseException):
    """As pyo3, by which Rust's panics come into Python, has it: no Exception."""


@pytest.mark.parametrize("fault", [Panic("at its end"), MemoryError()])
def test_a_check_that_fails_locks_nobody_out(
    fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is answered, with one line in the log; the next check is made."""
    faults = [fault] * 3

    def check(password: bytes, hashed: bytes) -> bool:
        if faults:
            raise faults.pop()
        return bcrypt.checkpw(password, hashed)

    users = Users({"alice": ALICES}, Checker(check))
    tried = (basic("alice", each) for each in ("a", "b", "c"))
    assert judge(users, *tried) == [HTTPStatus.SERVICE_UNAVAILABLE] * 3
    assert judge(users, basic("alice", "a")) == [OK]
    (told,) = caplog.messages
    assert told.startswith("passwords cannot be checked: ")


def test_without_threads_passwords_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the kernel allows no more: refused for now, without a traceback."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    users = make(Checks())
    with monkeypatch.context() as changed:
        changed.setattr(threading, "_start_new_thread", refuse)
        for _ in range(3):
            assert judge(users, basic("alice", "a")) == [HTTPStatus.SERVICE_UNAVAILABLE]
    assert judge(users, basic("alice", "a")) == [OK]
    (told,) = caplog.messages
    assert "passwords cannot be checked: no thread can be started: raise" in told


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def allowed(limiter: Limiter, asked: int) -> int:
    return sum(limiter.allow() for _ in range(asked))


def test_a_burst_and_then_one_each_interval() -> None:
    """The bucket is full at first, fills one by one, and not over its edge."""
    clock = Clock()
    limiter = Limiter(RateLimit(interval_s=2.0, burst=3), clock)
    assert allowed(limiter, 10) == 3
    clock.now_s += 1.0
    assert allowed(limiter, 10) == 0
    clock.now_s += 1.0
    assert allowed(limiter, 10) == 1
    clock.now_s += 100.0
    assert allowed(limiter, 10) == 3


def test_a_burst_of_none_allows_none() -> None:
    """As in exporter-toolkit, whose own test has that."""
    clock = Clock()
    limiter = Limiter(RateLimit(interval_s=1.0, burst=0), clock)
    clock.now_s += 100.0
    assert allowed(limiter, 10) == 0
