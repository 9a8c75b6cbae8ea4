# SPDX-License-Identifier: GPL-3.0-only
"""Notifications to systemd, and reloads by SIGHUP, with a real exporter.

A socket of the test replaces that of systemd.
"""

import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.kernel.helpers.forbidden_operations import LISTING, READING, REFUSED
from tests.kernel.helpers.resource_limits import limit
from tests.kernel.test_confinement import ATTEMPT, attempts
from tests.kernel.test_process import COMMAND, catches, status
from tests.support import DEADLINE_S, ESTABLISHED, Exporter, Peers, eventually

pytestmark = pytest.mark.any_kernel

POLLING = ("--source", "sock_diag")
WATCHDOG_S = 1.0

EXEC = """
import os, sys
os.environ["WATCHDOG_PID"] = str(os.getpid() + int(sys.argv.pop(1)))
"""
"""The start of a script, which sets WATCHDOG_PID to its process id plus an argument. It
replaces systemd, which knows the process id before the exporter starts."""

RUN = "from tcpexporter.__main__ import main; main()"


class Manager:
    """Replaces systemd: receives notifications in order."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(DEADLINE_S)
        self.address = address
        self.messages: list[str] = []

    def start(
        self,
        *arguments: str,
        watchdog: bool = False,
        for_another: bool = False,
        run: str = RUN,
    ) -> Exporter:
        """Start an exporter as systemd starts it."""
        environment = [f"NOTIFY_SOCKET={self.address}"]
        if watchdog:
            environment.append(f"WATCHDOG_USEC={int(WATCHDOG_S * 1e6)}")
        command = (
            "env",
            *environment,
            sys.executable,
            "-c",
            EXEC + run,
            str(int(for_another)),
        )
        return Exporter(*arguments, command=command)

    def wait_for(self, line: str) -> list[str]:
        """Wait for a message with a line that begins with ``line``; return its lines."""
        while True:
            self.messages.append(self._socket.recv(4096).decode())
            lines = self.messages[-1].splitlines()
            if any(each.startswith(line) for each in lines):
                return lines

    def discard_messages(self) -> None:
        """Discard all messages received so far."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)
        self._socket.settimeout(DEADLINE_S)

    def is_silent(self) -> bool:
        """Return whether no message arrives for three times as long as the watchdog
        waits."""
        self._socket.settimeout(3 * WATCHDOG_S)
        with contextlib.suppress(TimeoutError):
            self.messages.append(self._socket.recv(4096).decode())
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as listening:
        # An exporter that is not root must be able to send, as with systemd's socket.
        tmp_path.chmod(0o755)
        Path(listening.address).chmod(0o777)
        yield listening


def test_readiness_status_and_end_are_reported(manager: Manager) -> None:
    """The order is fixed; after a scrape the status has the number of tracked
    connections."""
    with manager.start("--source", "ebpf") as exporter, Peers() as peers:
        assert manager.wait_for("READY=1") == [
            "READY=1",
            "STATUS=counting connections by ebpf",
        ]
        before = [line for each in manager.messages for line in each.splitlines()]
        assert set(before[:-2]) <= {"STATUS=the pre-existing connections are being read"}
        peers.connect(3)
        assert exporter.established(peers.port) == 3
        code, _ = exporter.stop()
        assert code == 0
    manager.wait_for("STOPPING=1")
    assert not any("WATCHDOG" in each for each in manager.messages)


def test_notifications_reach_an_abstract_socket() -> None:
    """systemd uses one in a container; child processes do not inherit its name."""
    with Manager(f"@tcpexporter-test-{os.getpid()}") as manager:
        with manager.start(*POLLING, "--conf", "/dev/null") as exporter:
            pid = exporter.process.pid
            (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert "NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_text()
            manager.wait_for("READY=1")
            exporter.stop()
        manager.wait_for("STOPPING=1")


def test_the_exporter_can_send_to_no_other_socket(manager: Manager) -> None:
    """No system call lets code in the process send to another socket."""
    with manager.start(*POLLING, run=ATTEMPT) as exporter:
        outcomes = attempts(exporter)
        refused = {each for each in outcomes if each not in {**READING, **LISTING}}
        assert len(refused) == len(REFUSED) + 8
        assert {outcomes[each] for each in refused} == {"EPERM"}
        exporter.stop()
    manager.wait_for("STOPPING=1")


def test_the_exporter_runs_while_systemd_does_not_listen(tmp_path: Path) -> None:
    """It logs one warning, and continues if systemd stops listening later."""
    with Manager(str(tmp_path / "notify")) as gone:
        pass
    with gone.start(*POLLING) as exporter:
        assert exporter.get("/-/ready")
        code, log = exporter.stop()
    assert code == 0
    assert log.count("cannot send notifications to systemd") == 1
    with Manager(str(tmp_path / "later")) as going:
        exporter = going.start(*POLLING, watchdog=True)
        going.wait_for("READY=1")
    with exporter:
        assert exporter.get("/metrics")
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


def test_the_watchdog_is_fed_without_scrapes(manager: Manager) -> None:
    """The exporter collects at the watchdog's interval; the status has the tracked
    connections."""
    with manager.start("--source", "ebpf", watchdog=True), Peers() as peers:
        peers.connect(3)
        for _ in range(3):
            status, feed = manager.wait_for("STATUS=counting connections by ebpf, ")
            assert feed == "WATCHDOG=1"
            assert int(status.split()[-2].replace(",", "")) >= 0
        assert status.endswith(" tracked")


def test_the_watchdog_of_another_process_is_not_fed(manager: Manager) -> None:
    """WATCHDOG_PID names another process; the exporter still sends other notifications."""
    with manager.start(*POLLING, watchdog=True, for_another=True) as exporter:
        manager.wait_for("READY=1")
        exporter.stop()
    manager.wait_for("STOPPING=1")
    assert not any("WATCHDOG" in each for each in manager.messages)


def test_the_watchdog_is_not_fed_while_there_are_no_metrics(manager: Manager) -> None:
    """Without memory the status has the reason; later the watchdog is fed again."""
    with manager.start("--source", "ebpf", watchdog=True) as exporter:
        manager.wait_for("WATCHDOG=1")
        limit(exporter, "--as=1048576:")
        manager.wait_for("STATUS=there is not enough memory")
        for _ in range(3):
            (only,) = manager.wait_for("STATUS=")
            assert only.startswith("STATUS=there is not enough memory")
        limit(exporter, "--as=unlimited")
        status, _ = manager.wait_for("WATCHDOG=1")
        assert status.startswith("STATUS=counting connections")
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


STUCK = """
import threading
from tcpexporter.socket_tables import saved_ages as state
from tcpexporter.__main__ import main
state.INTERVAL_S, state.LIMIT_S = 0.1, 0.3
state.State._save = lambda self, connections: threading.Event().wait()
main()
"""


def test_the_watchdog_is_not_fed_while_a_thread_hangs(
    manager: Manager, tmp_path: Path
) -> None:
    """Even the thread that saves ages matters, although counts do not depend on it. A
    metric counts the failures."""
    saving = ("--state", str(tmp_path / "state"))
    with manager.start(*POLLING, *saving, watchdog=True, run=STUCK) as exporter:
        manager.wait_for("STATUS=the thread state hangs")
        for _ in range(3):
            (only,) = manager.wait_for("STATUS=")
            assert only.startswith("STATUS=the thread state hangs")
        assert exporter.value("tcpexporter_background_failures_total", task="state")


HANGS = """
import runpy
runpy.run_module("tests.kernel.helpers.hanging_collection", run_name="__main__")
"""


@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
def test_the_watchdog_is_not_fed_while_collecting_hangs(
    manager: Manager, source: str
) -> None:
    """The exporter sends nothing from then on, and systemd's signal ends it at once.

    `tests/vm/package.py` has the same case with systemd.
    """
    with manager.start("--source", source, watchdog=True, run=HANGS) as exporter:
        manager.wait_for("WATCHDOG=1")
        eventually(lambda: reads_a_pipe(exporter.process.pid))
        manager.discard_messages()
        assert manager.is_silent()
        assert reads_a_pipe(exporter.process.pid)
        exporter.process.send_signal(signal.SIGABRT)  # the default of WatchdogSignal=
        assert exporter.process.wait(DEADLINE_S) == -signal.SIGABRT


def reads_a_pipe(process: int) -> bool:
    """Return whether the main thread of a process waits for data from a pipe."""
    return Path(f"/proc/{process}/wchan").read_text().endswith("pipe_read")


# Reloads


class Configured:
    """An exporter that reads its settings from a file, and again at SIGHUP."""

    def __init__(self, conf: Path, manager: Manager) -> None:
        self.conf = conf
        self.manager = manager

    def start(self, *arguments: str) -> Exporter:
        return self.manager.start(*POLLING, "--conf", str(self.conf), *arguments)

    def reload(self, exporter: Exporter, text: str | None = None) -> None:
        """Replace the file and reload; the new settings are in force before READY=1 is
        sent."""
        if text is not None:
            self.conf.write_text(text)
        exporter.process.send_signal(signal.SIGHUP)
        reloading, moment = self.manager.wait_for("RELOADING=1")
        assert reloading == "RELOADING=1"
        assert moment.startswith("MONOTONIC_USEC=")
        assert self.manager.wait_for("READY=1") == ["READY=1"]


@pytest.fixture
def configured(tmp_path: Path, manager: Manager) -> Configured:
    """The settings file is readable by root only."""
    conf = tmp_path / "conf"
    conf.touch(0o600)
    conf.write_text("duration 3600\n")
    return Configured(conf, manager)


def reloaded(exporter: Exporter) -> float | None:
    return exporter.value("tcpexporter_config_last_reload_successful")


def test_duration_and_ports_change_at_a_reload(configured: Configured) -> None:
    """No connection is lost, although the process is no longer root."""
    with configured.start() as exporter, Peers() as one, Peers() as other:
        one.connect(3)
        other.connect(5)
        eventually(lambda: exporter.established(other.port) == 5)
        assert exporter.long_term(one.port) == 0
        configured.reload(exporter, f"duration 0\nport {one.port}\n")
        assert exporter.long_term(one.port) == 3
        assert exporter.established(other.port) is None
        assert "<td>0</td>" in exporter.get("/")
        configured.reload(exporter, "duration 0\n")
        assert exporter.long_term(other.port) == 5
        code, log = exporter.stop()
    assert code == 0
    assert f"reloaded: port is {one.port}, duration is 0\n" in log
    assert "reloaded: port is all\n" in log


def test_a_reload_names_settings_that_require_a_restart(configured: Configured) -> None:
    """The same log line has the changed settings. It is written whatever the old log
    level is."""
    with configured.start() as exporter:
        configured.reload(
            exporter, "duration 7\nlisten 127.0.0.1:1\nmax-series 7\nsimple\n"
        )
        configured.reload(exporter, "duration 7\nlog-level error\n")
        configured.reload(exporter, "log-level info\n")
        assert "--max-series</th><td>2000<" in exporter.get("/")
        _, log = exporter.stop()
    assert "reloaded: duration is 7; restart required for simple, max-series\n" in log
    assert "reloaded: log-level is error\n" in log
    assert "reloaded: duration is 6, log-level is info\n" in log


def test_flags_win_over_a_reloaded_file(configured: Configured) -> None:
    """Flags have the same precedence as at the start, so nothing changes."""
    with configured.start("--duration", "11") as exporter:
        configured.reload(exporter, "duration 7\n")
        assert exporter.value("tcpexporter_duration_seconds") == 11
        assert reloaded(exporter) == 1
        _, log = exporter.stop()
    assert "reloaded: no change, or flags and environment variables override it\n" in log


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("duration 5\nport https\n", "conf line 2: port must be "),
        ("durations 5\n", "conf line 1: 'durations' is not a setting"),
        (None, "conf cannot be read: No such file or directory"),
    ],
)
def test_a_reload_of_an_invalid_file_changes_nothing(
    configured: Configured, text: str | None, sentence: str
) -> None:
    """The log has the line and the reason; a metric shows the failure until a reload
    succeeds."""
    with configured.start() as exporter:
        assert reloaded(exporter) == 1
        if text is None:
            configured.conf.unlink()
        configured.reload(exporter, text)
        assert reloaded(exporter) == 0
        assert exporter.value("tcpexporter_duration_seconds") == 3600
        configured.reload(exporter, "duration 5\n")
        assert reloaded(exporter) == 1
        assert exporter.value("tcpexporter_duration_seconds") == 5
        _, log = exporter.stop()
    (warning,) = (line for line in log.splitlines() if "WARNING" in line)
    assert "reload of settings failed" in warning
    assert sentence in warning


def test_sighup_without_a_file_is_logged(tmp_path: Path) -> None:
    """SIGHUP does nothing else, and does not end the exporter."""
    log = tmp_path / "log"
    command = ("sh", "-c", f'exec "$@" 2>{log}', "sh", *COMMAND)
    warning = re.compile("WARNING .*: SIGHUP has no effect: neither --conf nor")
    with Exporter(*POLLING, command=command) as exporter:
        exporter.process.send_signal(signal.SIGHUP)
        eventually(lambda: warning.search(log.read_text()) is not None)
        assert exporter.get("/metrics")
        code, _ = exporter.stop()
    assert code == 0


def test_many_sighups_apply_the_last_content_of_the_file(configured: Configured) -> None:
    """The last content of the file is in force, and every scrape gets a response."""
    with configured.start() as exporter:
        for duration in range(101):
            configured.conf.write_text(f"duration {duration}\n")
            exporter.process.send_signal(signal.SIGHUP)
            if duration % 10 == 0:
                assert ESTABLISHED in exporter.get("/metrics")
        eventually(lambda: exporter.value("tcpexporter_duration_seconds") == 100)
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


def test_a_sighup_during_the_start_is_handled_later(configured: Configured) -> None:
    """The exporter handles it after READY=1, which is not sent early."""
    starting = Exporter(
        *("--source", "ebpf", "--conf", str(configured.conf)),
        command=(
            "env",
            f"NOTIFY_SOCKET={configured.manager.address}",
            sys.executable,
            "-m",
            "tcpexporter",
        ),
        wait=False,
    )
    with starting as exporter:
        eventually(lambda: catches(exporter.process.pid, signal.SIGHUP))
        configured.conf.write_text("duration 11\n")
        exporter.process.send_signal(signal.SIGHUP)
        assert configured.manager.wait_for("READY=1")[1].startswith("STATUS=counting")
        configured.manager.wait_for("RELOADING=1")
        configured.manager.wait_for("READY=1")
        assert exporter.value("tcpexporter_duration_seconds") == 11


def test_a_killed_reader_process_is_reported(configured: Configured) -> None:
    """One warning has the remedy, and SIGHUP logs it again; a metric shows it. Scrapes
    continue."""
    with configured.start() as exporter:
        pid = exporter.process.pid
        (reader,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        eventually(lambda: ignores(int(reader), signal.SIGHUP))
        os.kill(int(reader), signal.SIGHUP)
        configured.reload(exporter)
        os.kill(int(reader), signal.SIGKILL)
        eventually(lambda: reloaded(exporter) == 0)
        configured.reload(exporter, "duration 5\n")
        assert exporter.value("tcpexporter_duration_seconds") == 3600
        code, log = exporter.stop()
    assert code == 0
    assert (
        log.count("configuration files are not read again: the process that reads files")
        == 1
    )
    assert (
        log.count("SIGHUP has no effect: the process that reads files has ended: restart")
        == 1
    )


def ignores(process: int, number: signal.Signals) -> bool:
    return bool(int(status(process, process)["SigIgn"][0], 16) >> (number - 1) & 1)
