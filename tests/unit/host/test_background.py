# SPDX-License-Identifier: GPL-3.0-only
"""Background threads report failing, hanging and ended work.

The kind of fault: such a thread stopped silently, and counts stayed at their old values.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Generator, Iterator
from typing import cast

import pytest

from tcpexporter.config.reader import ANSWERED, Message, Reader
from tcpexporter.config.reload import Reloading, ReloadSignal
from tcpexporter.connections.record import Records
from tcpexporter.ebpf import reconciler as reconciler_module
from tcpexporter.ebpf.event_counters import Events
from tcpexporter.ebpf.reconcile import NOTHING
from tcpexporter.ebpf.reconciler import Reconciler
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import SocketTableError, ThreadError
from tcpexporter.host import background
from tcpexporter.host.background import Task
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.socket_tables.polling import PollingSource
from tests.support import DEADLINE_S, eventually
from tests.unit.ebpf.fake_tracker import NoRuns
from tests.unit.socket_tables.test_polling import (
    BY_REMOTE_PORT,
    FakeTables,
    ages_of,
    failing,
)

NO_THREAD = RuntimeError("can't start new thread")
FAULTS = [
    (NO_THREAD, "no thread can be started: raise the limit of processes"),
    (MemoryError(), "there is not enough memory"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files: raise Limit"),
    (OSError(errno.EINTR, os.strerror(errno.EINTR)), "Interrupted system call"),
    (SocketTableError("no sock_diag"), "no sock_diag"),
    (ZeroDivisionError("a fault"), "ZeroDivisionError: a fault"),
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_S", 0.001)
    monkeypatch.setattr(reconciler_module, "WATCH_S", 0.001)


class Work:
    """The loop of a task; a test controls what each round does."""

    def __init__(self, limit_s: float = 60) -> None:
        self.error: BaseException | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.rounds = 0
        self.task = Task("work", self.loop, without="nothing is done", limit_s=limit_s)

    def loop(self) -> None:
        while not self.task.wait(0.001):
            with self.task.attempt():
                self.goes_on.wait()
                self.rounds += 1
                if self.error:
                    raise self.error

    def do(self, rounds: int) -> None:
        enough = self.rounds + rounds
        eventually(lambda: self.rounds >= enough)


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.goes_on.set()
    made.task.stop(10)


@pytest.mark.parametrize(("error", "sentence"), FAULTS)
def test_a_failing_round_is_logged_once_counted_and_repeated(
    work: Work, error: Exception, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Any error is logged as one line without a traceback, and so is the next success."""
    caplog.set_level(logging.INFO)
    work.task.begin()
    work.do(3)
    assert work.task.trouble() is None
    assert work.task.failures() == 0
    work.error = error
    work.do(7)
    trouble = work.task.trouble()
    assert trouble
    assert sentence in trouble
    assert background.trouble([work.task]) == trouble
    work.error = None
    eventually(lambda: work.task.trouble() is None)
    assert work.task.failures() >= 6
    first, second = caplog.messages
    assert first == f"nothing is done: {trouble}"
    assert second == "work: the thread works again"


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(), GeneratorExit()])
def test_a_loop_that_raises_is_run_again(error: BaseException) -> None:
    """This includes exceptions that end a thread silently, such as SystemExit."""
    entered = []

    def loop() -> None:
        entered.append(1)
        if len(entered) < 3:
            raise error
        while not task.wait(0.001):
            with task.attempt():
                pass

    task = Task("work", loop, without="nothing is done", limit_s=60)
    task.begin()
    eventually(lambda: len(entered) == 3 and task.trouble() is None)
    assert task.failures() == 2
    assert task.stop(10)


def test_a_loop_that_returns_is_a_failure() -> None:
    """Without this check nothing would detect the ended thread."""
    task = Task("work", lambda: None, without="nothing is done", limit_s=60)
    task.begin()
    eventually(lambda: task.trouble() is not None)
    assert task.trouble() == "nothing is done: the thread has ended: restart the exporter"


def test_a_hanging_round_is_logged_once_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The counter increases while the thread hangs, and does not decrease afterwards."""
    caplog.set_level(logging.INFO)
    work = Work(limit_s=0.1)
    work.task.begin()
    work.goes_on.clear()
    eventually(lambda: work.task.failures() >= 3)
    assert work.task.trouble() == "the thread work hangs: it has exceeded its time limit"
    work.goes_on.set()
    eventually(lambda: work.task.trouble() is None)
    assert work.task.failures() >= 3
    assert work.task.stop(10)
    assert caplog.messages[0].startswith("nothing is done: the thread work hangs")
    assert caplog.messages[1] == "work: the thread no longer hangs"


def test_a_thread_that_cannot_start_is_an_error(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one sentence with the remedy, and a second attempt can succeed."""

    def refuse(*_: object) -> None:
        raise NO_THREAD

    with monkeypatch.context() as changed:
        changed.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ThreadError, match="no thread can be started: raise the limit"):
            work.task.begin()
    assert work.task.trouble() is None
    work.task.begin()
    work.do(1)


class ReportedWait(threading.Event):
    """An event that reports that a thread waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.has_waiter = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.has_waiter.set()
        return super().wait(timeout)


def test_a_wait_that_is_longer_than_the_time_limit_is_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread waits for its first round before `begin` returns: --interval 5m."""
    stop = ReportedWait()
    start = background.start

    def loop() -> None:
        while not task.wait(300):
            pass

    def start_and_wait(thread: threading.Thread) -> None:
        start(thread)
        assert stop.has_waiter.wait(DEADLINE_S)

    task = Task("work", loop, without="nothing is done", limit_s=0.007)
    monkeypatch.setattr(task, "_stop", stop)
    monkeypatch.setattr(background, "start", start_and_wait)
    task.begin()
    time.sleep(3 * 0.007)
    assert task.trouble() is None
    assert task.stop(10)


class FaultyTables(FakeTables):
    """Socket tables whose dump raises an error, or hangs."""

    def __init__(self) -> None:
        super().__init__(1, 2, 3)
        self.fault: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()

    def established(self, *, with_ages: bool = True) -> Records:
        self.answers.wait()
        if self.fault:
            raise self.fault
        return super().established(with_ages=with_ages)


@pytest.mark.parametrize(("error", "sentence"), FAULTS)
def test_polling_continues_after_any_error(error: Exception, sentence: str) -> None:
    """Until a poll succeeds, the source gives an error instead of old counts."""
    tables = FaultyTables()
    source = PollingSource(tables, interval_s=0.001, parts=BY_REMOTE_PORT)
    source.start()
    tables.fault = error
    eventually(lambda: failing(source))
    assert sentence in str(source.tasks()[0].trouble())
    tables.ports = (2, 3, 5)
    tables.fault = None
    eventually(lambda: not failing(source))
    eventually(lambda: ages_of(source).keys() == {2, 3, 5})
    assert ages_of(source)[2] == 1
    source.close()


def test_a_poll_that_hangs_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter can still end, and the tables stay open until the poll has ended."""
    monkeypatch.setattr("tcpexporter.socket_tables.polling.LIMIT_S", 0.1)
    monkeypatch.setattr("tcpexporter.socket_tables.polling.STOP_TIMEOUT_S", 0.1)
    tables = FaultyTables()
    source = PollingSource(tables, interval_s=0.001, parts=BY_REMOTE_PORT)
    source.start()
    tables.answers.clear()
    eventually(lambda: failing(source))
    source.close()
    assert not tables.closed
    tables.answers.set()


class CountingTracker:
    """The counters of a tracker; a reconciliation fails before it uses anything else."""

    def __init__(self) -> None:
        self.missed = 0
        self.restored = 0
        self.runs = NoRuns()

    def reclaim(self) -> None:
        pass

    def events(self) -> Events:
        return Events(self.missed, 0, 0, 0, 0, 0, 0, self.missed)


@pytest.mark.parametrize(("error", "sentence"), FAULTS)
def test_counts_are_refused_after_missed_events_without_reconciliation(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading fails until a reconciliation succeeds; each failure is counted."""
    tracker, tables = CountingTracker(), FaultyTables()
    tables.fault = error
    reconciler = Reconciler(cast("Tracker", tracker), tables, interval_s=0.01, cpu_share=1)
    reconciler.start()
    eventually(lambda: reconciler.task.failures() >= 7)
    assert reconciler.trouble() is None
    tracker.missed = 1
    trouble = reconciler.trouble()
    assert trouble
    assert trouble.startswith("events were missed and reconciliation failed: ")
    assert sentence in trouble
    monkeypatch.setattr(reconciler_module, "reconcile", lambda *_: NOTHING)
    eventually(lambda: reconciler.trouble() is None)
    eventually(lambda: reconciler.task.trouble() is None)
    reconciler.close()


class StubReader:
    """Replaces the reader process: sends one message for each request."""

    def __init__(self) -> None:
        self.fileno = ReloadSignal().fileno  # nothing arrives on this socket
        self.telling: list[Message] = []

    def ask(self) -> None:
        self.telling = [Message("settings"), Message(ANSWERED)]

    def receive(self) -> Message:
        return self.telling.pop(0)


@pytest.mark.parametrize(("error", "sentence"), FAULTS[3:4] + FAULTS[5:])
def test_a_failed_reload_is_repeated(
    error: Exception, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again without another SIGHUP."""
    faults, taken = [error] * 3, []

    def take(told: Message) -> None:
        if faults:
            raise faults.pop()
        taken.append(told)

    reload_signal = ReloadSignal()
    reader = cast("Reader", StubReader())
    reloading = Reloading(reader, reload_signal, Supervisor(None, None), Reloads())
    reloading.follow({"settings": take})
    for number in (1, 2):
        reload_signal.raise_again()
        eventually(lambda number=number: len(taken) == number)  # type: ignore[misc]
        eventually(lambda: reloading.task.trouble() is None)
    assert reloading.task.failures() == 3
    (told,) = caplog.messages
    assert told == f"changes of configuration files are ignored: {sentence}"
    reloading.close()
    reload_signal.raise_again()


def test_the_next_item_is_made_while_the_caller_uses_one() -> None:
    """Reading the socket tables and adding connections take about the same time."""
    begun = [threading.Event() for _ in range(3)]

    def items() -> Generator[int, None, None]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    found = []
    for item in background.ahead(items()):
        if item < 2:
            assert begun[item + 1].wait(DEADLINE_S)
        found.append(item)
    assert found == [0, 1, 2]


def test_an_error_of_the_next_item_reaches_the_caller() -> None:
    """It is raised after the items before it, and the generator is closed."""

    def items() -> Generator[int, None, None]:
        yield 7
        raise SocketTableError("the dump is incomplete")

    found: list[int] = []
    made = items()
    with pytest.raises(SocketTableError, match="incomplete"):
        found.extend(background.ahead(made))
    assert not list(made)


def test_a_caller_that_stops_leaves_no_thread_and_no_open_generator() -> None:
    """Otherwise the lock of the socket tables would stay locked."""
    lock = threading.Lock()

    def items() -> Generator[int, None, None]:
        with lock:
            yield from range(5)

    with contextlib.closing(background.ahead(items())) as made:
        assert next(made) == 0
    assert not lock.locked()
    assert not [each for each in threading.enumerate() if each.name == "ahead"]


def test_a_thread_for_the_next_item_that_cannot_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of threads is named, and the generator is closed."""

    def refuse(_: threading.Thread) -> None:
        raise NO_THREAD

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ThreadError, match="raise the limit of processes"):
        next(background.ahead(each for each in range(3)))
