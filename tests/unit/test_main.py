# SPDX-License-Identifier: GPL-3.0-only
"""Start-up: logging, the choice of the source, the output of --once, exit codes."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tcpexporter import __main__ as main
from tcpexporter import collecting, phases, request
from tcpexporter.config.settings import Settings
from tcpexporter.connections.parts import Direction, kernel_parts
from tcpexporter.connections.record import IPV4_PREFIX, SOCKET, Records
from tcpexporter.connections.source import MemorySource, Source
from tcpexporter.errors import LoadError, SocketTableError, SourceError
from tcpexporter.host import logs, namespaces, stdout
from tcpexporter.host.starting import Starting
from tcpexporter.metrics.collector import make_registry


@contextlib.contextmanager
def set_up_logging(settings: Settings, *, to_journal: bool = False) -> Iterator[None]:
    """Set up logging as the exporter does, and restore it afterwards."""
    root, asyncio = logging.getLogger(), logging.getLogger("asyncio")
    before = root.handlers, root.level, asyncio.level
    root.handlers = []
    try:
        logs.set_up(settings.log_level, settings.log_format, to_journal=to_journal)
        yield
    finally:
        root.handlers = before[0]
        root.setLevel(before[1])
        asyncio.setLevel(before[2])


def log_something() -> None:
    log = logging.getLogger("tcpexporter.socket_tables.tables")
    log.debug("not to be seen")
    log.warning('reading %s instead:\n"%s"', "/proc/net/tcp", "näh")


def test_a_log_line_can_be_text(capsys: pytest.CaptureFixture[str]) -> None:
    """It has time, level, logger and message, and goes to standard error."""
    with set_up_logging(Settings(log_format="text")):
        log_something()
    out, err = capsys.readouterr()
    assert out == ""
    _, _, rest = err.partition(" WARNING ")
    assert (
        rest == 'tcpexporter.socket_tables.tables: reading /proc/net/tcp instead:\n"näh"\n'
    )


def test_a_log_line_can_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is one JSON object, whatever characters the message has."""
    with set_up_logging(Settings(log_format="json")):
        log_something()
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    record = json.loads(line)
    logged = datetime.fromisoformat(record.pop("time"))
    assert logged.utcoffset() is not None
    assert abs(datetime.now(UTC) - logged) < timedelta(minutes=1)
    assert record == {
        "level": "WARNING",
        "logger": "tcpexporter.socket_tables.tables",
        "message": 'reading /proc/net/tcp instead:\n"näh"',
    }


def test_a_log_line_for_the_journal_has_a_severity_and_no_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each line of a message has the severity, because the journal splits lines."""
    with set_up_logging(Settings(), to_journal=True):
        log_something()
        logging.getLogger("tcpexporter").error("failed")
    assert capsys.readouterr().err.splitlines() == [
        "<4>tcpexporter.socket_tables.tables: reading /proc/net/tcp instead:",
        '<4>"näh"',
        "<3>tcpexporter: failed",
    ]


def test_only_the_stream_that_systemd_names_is_the_journal() -> None:
    """A child of a service inherits the variable, but may have another standard error."""
    status = os.fstat(2)
    stream = f"{status.st_dev}:{status.st_ino}"
    assert logs.is_journal({"JOURNAL_STREAM": stream})
    assert not logs.is_journal({"JOURNAL_STREAM": f"{stream}0"})
    assert not logs.is_journal({})


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log_level_limits_what_is_logged(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With error no warning is logged; with debug everything except asyncio's lines."""
    with set_up_logging(Settings(log_level="error", log_format=log_format)):
        log_something()
    assert capsys.readouterr().err == ""
    with set_up_logging(Settings(log_level="debug", log_format=log_format)):
        log_something()
        logging.getLogger("asyncio").debug("Using selector")
    shown = capsys.readouterr().err
    assert "not to be seen" in shown
    assert "selector" not in shown


class Sources:
    """Replaces `_open_named_source`: returns a source in memory, or raises an error."""

    def __init__(self, **broken: SourceError) -> None:
        self.broken = broken
        self.asked: list[str] = []

    def open(self, name: str, *_: object) -> Source:
        self.asked.append(name)
        if name in self.broken:
            raise self.broken[name]
        return MemorySource(name=name)


NO_BPF = LoadError("BPF requires root")
NO_DIAG = SocketTableError("modprobe tcp_diag may help")
NO_PROC = SocketTableError("/proc is not mounted")


@pytest.mark.parametrize(
    ("sources", "asked", "warning"),
    [
        (Sources(), ["ebpf"], None),
        (
            Sources(ebpf=NO_BPF),
            ["ebpf", "sock_diag"],
            "polling sock_diag, because ebpf does not work: BPF requires root",
        ),
        (
            Sources(ebpf=NO_BPF, sock_diag=NO_DIAG),
            ["ebpf", "sock_diag", "procfs"],
            (
                "polling procfs, because ebpf does not work: BPF requires root;"
                " sock_diag does not work: modprobe tcp_diag may help"
            ),
        ),
    ],
)
def test_auto_chooses_the_first_source_that_works(
    sources: Sources,
    asked: list[str],
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning has, for each preferred source, the reason why it does not work and
    the remedy."""
    monkeypatch.setattr(collecting, "_open_named_source", sources.open)
    assert collecting.open_source(Settings(source="auto")).name == asked[-1]
    assert sources.asked == asked
    assert caplog.messages == ([warning] if warning else [])


def test_auto_without_any_source_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the reason of each source."""
    sources = Sources(ebpf=NO_BPF, sock_diag=NO_DIAG, procfs=NO_PROC)
    monkeypatch.setattr(collecting, "_open_named_source", sources.open)
    with pytest.raises(SourceError, match=r"requires root.*modprobe.*is not mounted"):
        collecting.open_source(Settings(source="auto"))


@pytest.mark.parametrize("name", collecting.SOURCES)
def test_a_named_source_that_does_not_work_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other source is tried."""
    sources = Sources(ebpf=NO_BPF, sock_diag=NO_DIAG, procfs=NO_PROC)
    monkeypatch.setattr(collecting, "_open_named_source", sources.open)
    with pytest.raises(SourceError) as raised:
        collecting.open_source(Settings(source=name))
    assert raised.value is sources.broken[name]
    assert sources.asked == [name]


@pytest.mark.parametrize("name", ["sock_diag", "procfs"])
def test_a_named_source_is_opened(name: str) -> None:
    """The polling sources are really opened, because they require no root."""
    source = collecting.open_source(Settings(source=name))
    assert source.name == name
    source.start()
    assert sum(len(each.words) for each in source.read()) >= 0
    source.close()


def connections(port: int, number: int, direction: Direction) -> Records:
    made = np.zeros(number, SOCKET)
    made["key"]["netns"], made["key"]["remote_port"] = namespaces.inode(), 5432
    made["key"]["local_port"] = port
    made["key"]["local_address"][:, :12] = IPV4_PREFIX
    made["is_outbound"] = direction
    return made


class SourceHere(MemorySource):
    """A source that holds the exporter's namespace, as real ones do by default."""

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.array([namespaces.inode()], np.uint32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), {"443": 3}),
        (Settings(direction="outbound"), {"40001": 5}),
        (Settings(direction="all"), {"443": 3, "40001": 5}),
        (Settings(direction="all", max_series=1), {"40001": 5, "other": 3}),
        (Settings(direction="all", ports=(443,), tcpv6=False), {"443": 3}),
        (Settings(ports=(8443,), tcpv6=False), {"8443": 0}),
        (Settings(direction="outbound", labels=("port", "remote_port")), {"": 5}),
        (Settings(direction="all", labels=("port", "direction")), {"443": 3, "40001": 5}),
        (Settings(listen_port=443), {}),
        (Settings(listen_port=443, once=True), {"443": 3}),
    ],
)
def test_once_prints_the_selected_series(
    settings: Settings, expected: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard output has the ports and directions in the settings."""
    source = SourceHere(
        [connections(443, 3, Direction.INBOUND), connections(40001, 5, Direction.OUTBOUND)],
        parts=kernel_parts(
            request.DIRECTIONS[settings.direction],
            settings.series_labels,
            request.own_listener(settings),
        ),
    )
    choice = collecting.chooser(settings, source)(settings)
    registry = make_registry(collecting.make_collector(source, settings, choice))
    stdout.write(phases._exposition_after(0, registry, None))
    out, err = capfd.readouterr()
    assert err == ""
    assert {
        sample.labels["port"]: sample.value
        for family in text_string_to_metric_families(out)
        for sample in family.samples
        if sample.name == "tcp_established_connections"
    } == expected


@pytest.mark.parametrize("direction", request.DIRECTIONS)
def test_no_labels_are_the_same_as_simple(direction: str) -> None:
    """Both export one number; the other labels of a series do not matter."""

    def page(settings: Settings) -> list[tuple[str, dict[str, str], float]]:
        source = SourceHere(
            [connections(443, 3, Direction.INBOUND), connections(7, 5, Direction.OUTBOUND)],
            parts=kernel_parts(
                request.DIRECTIONS[settings.direction], settings.series_labels
            ),
        )
        choice = collecting.chooser(settings, source)(settings)
        collected = collecting.make_collector(source, settings, choice)
        return [
            (each.name, each.labels, each.value)
            for family in collected.collect()
            for each in family.samples
            if not each.name.endswith("collect_duration_seconds")
        ]

    simple = page(Settings(simple=True, direction=direction))
    assert page(Settings(labels=(), direction=direction)) == simple
    assert page(Settings(simple=True, labels=("port",), direction=direction)) == simple
    expected = {"inbound": 3, "outbound": 5, "all": 8}[direction]
    assert ("tcp_established_connections", {}, expected) in simple


class SlowSource(MemorySource):
    """A source whose start waits for an event, and may fail."""

    def __init__(self, failure: SourceError | None = None) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.failure = failure

    def start(self) -> None:
        self.go_on.wait()
        if self.failure:
            raise self.failure


@pytest.fixture
def stopped() -> Iterator[threading.Event]:
    """Return whether SIGTERM has arrived; the handlers of `main` are removed afterwards."""
    came = threading.Event()
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def join_start() -> None:
    """Wait until the start has ended, and Python has handled its signal."""
    for thread in threading.enumerate():
        if thread.name == "start":
            thread.join(10)


def test_readiness_waits_for_the_start(stopped: threading.Event) -> None:
    """Until the source has started, the reason for 503 is that it is starting."""
    source = SlowSource()
    starting = Starting(source.start)
    reports = []
    starting.begin(lambda: reports.append(starting.awaited()))
    assert starting.awaited() == "the pre-existing connections are being read"
    assert reports == []
    source.go_on.set()
    join_start()
    assert starting.awaited() is None
    assert reports == [None]
    starting.raise_failure()
    assert not stopped.is_set()


def test_a_failed_start_ends_the_exporter(stopped: threading.Event) -> None:
    """A signal stops the server, the failure is raised, and readiness is never reported."""
    source = SlowSource(NO_DIAG)
    starting = Starting(source.start)
    starting.begin(lambda: pytest.fail("it is not ready"))
    source.go_on.set()
    join_start()
    assert stopped.is_set()
    assert starting.awaited()
    with pytest.raises(SocketTableError, match="modprobe"):
        starting.raise_failure()


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--port", "http"], 2, "tcpexporter: flag --port: port must be "),
        (
            ["--once", "--source", "ebpf", "--user", "nobody"],
            1,
            "tcpexporter: BPF requires root\n",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """2 for an invalid setting, 1 for a failure; there is no traceback."""
    monkeypatch.setattr(sys, "argv", ["tcpexporter", *arguments])
    monkeypatch.setattr(collecting, "_open_named_source", Sources(ebpf=NO_BPF).open)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(complaint)
    assert err.count("\n") == 1
