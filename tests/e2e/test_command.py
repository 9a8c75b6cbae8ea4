# SPDX-License-Identifier: GPL-3.0-only
"""The installed command: output, settings, and running without root."""

import html
import os
import pty
import re
import select
import socket
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.support import COMMAND, Command, tool
from tests.support import DEADLINE_S, ESTABLISHED, LONG_TERM, Peers, free_port

NOBODY = 65534
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    # The tests may be in a directory that only root can read.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)

INHERITED = f'{LONG_TERM} non-counter metrics should not have "_total" suffix'
"""promtool's only permitted objection: the name is inherited from the Go program."""


def run(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        input=given,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def objections(page: str) -> list[str]:
    """Return promtool's objections to a page; it ignores families without samples."""
    checked = run(tool("promtool"), "check", "metrics", given=page)
    return (checked.stdout + checked.stderr).splitlines()


def count(page: str, metric: str, port: int) -> dict[str, float]:
    """Return the values of a port in an exposition, by IP version."""
    return {
        sample.labels["tcp_version"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == metric and sample.labels["port"] == str(port)
    }


def read_terminal(controller: int, last: str | None = None) -> str:
    """Return the output of a terminal up to ``last``, or until its other side is closed."""
    until = time.monotonic() + DEADLINE_S
    shown = b""
    while last is None or last.encode() not in shown:
        ready, _, _ = select.select([controller], [], [], until - time.monotonic())
        assert ready, f"{last!r} does not appear on the terminal: {shown!r}"
        try:
            shown += os.read(controller, 4096)
        except OSError:  # EIO: pty(7), the other side is closed
            assert last is None, f"{last!r} does not appear on the terminal: {shown!r}"
            break
    return shown.decode()


def shown_settings(page: str) -> dict[str, str]:
    """Return the settings in the table of the status page."""
    rows = re.findall('<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page)
    return {html.unescape(name): html.unescape(value) for name, value in rows}


@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_promtool_objects_to_the_inherited_name_only(source: str) -> None:
    """``promtool check metrics`` on an exposition of each source, with series."""
    with Peers("::") as peers, Command("--source", source) as exporter:
        peers.connect(1)
        assert objections(exporter.get("/metrics")) == [INHERITED]


def test_promtool_objects_to_nothing_else_with_simple() -> None:
    """``promtool check metrics`` on an exposition with ``--simple``."""
    with Command("--simple") as exporter:
        assert objections(exporter.get("/metrics")) == [INHERITED]


def test_once_prints_the_exposition_and_nothing_else() -> None:
    """In a pipe ``--once`` prints metrics, nothing to standard error, and exits with 0."""
    with Peers("::") as peers:
        peers.connect(7, "127.0.0.1")
        peers.connect(5, "::1")
        ended = run(COMMAND, "--once", "--duration", "1")
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert count(ended.stdout, LONG_TERM, peers.port) == {"4": 7, "6": 5}
    assert objections(ended.stdout) == [INHERITED]


def test_once_counts_down_on_a_terminal() -> None:
    """Standard error shows the seconds left. Connections that open meanwhile are
    counted."""
    controller, terminal = pty.openpty()
    try:
        with Peers() as peers:
            peers.connect(7)
            with subprocess.Popen(
                [COMMAND, "--once", "--duration", "4"],
                stdout=subprocess.PIPE,
                stderr=terminal,
                text=True,
            ) as watching:
                try:
                    os.close(terminal)
                    shown = read_terminal(controller, "2 s left")
                    peers.connect(5)
                    shown += read_terminal(controller)
                    page, _ = watching.communicate(timeout=DEADLINE_S)
                finally:
                    watching.kill()
    finally:
        os.close(controller)
    assert watching.returncode == 0
    assert re.findall("([0-9]+) s left", shown) == ["4", "3", "2", "1"]
    assert shown.endswith("\r\033[K")  # clears the line for later output
    assert count(page, ESTABLISHED, peers.port) == {"4": 12}
    assert count(page, LONG_TERM, peers.port) == {"4": 7}
    assert objections(page) == [INHERITED]


def test_settings_come_from_flag_environment_and_file(tmp_path: Path) -> None:
    """Flags override environment, environment overrides file; the status page shows it."""
    conf = tmp_path / "tcpexporter.conf"
    conf.write_text(
        "# the web server\n"
        "port 443\n"
        "tcpv6=false\n"
        "duration 30\n"
        "direction outbound\n"
        "max-connections 1009\n"
    )
    environment = (
        "env",
        "TCPEXPORTER_DURATION=11",
        "TCPEXPORTER_DIRECTION=all",
        "TCPV6=true",
    )
    with Command(
        "--conf", str(conf), "--direction=inbound", command=(*environment, COMMAND)
    ) as exporter:
        shown = shown_settings(exporter.get("/"))
        page = exporter.get("/metrics")
    assert shown["--port"] == "443"
    assert shown["--duration"] == "11"
    assert shown["--direction"] == "inbound"
    assert shown["--tcpv6"] == "true"
    assert shown["--max-connections"] == "1009"
    assert shown["--conf"] == str(conf)
    assert "\ntcpexporter_duration_seconds 11.0\n" in page
    assert count(page, LONG_TERM, 443) == {"4": 0, "6": 0}


def test_an_invalid_line_in_the_file_is_refused(tmp_path: Path) -> None:
    """Exit code 2, and one line with the file, the line number and the valid values."""
    conf = tmp_path / "tcpexporter.conf"
    conf.write_text("simple\nport https\n")
    ended = run(COMMAND, "--conf", str(conf))
    assert ended.returncode == 2
    assert ended.stdout == ""
    (sentence,) = ended.stderr.splitlines()
    assert f"{conf} line 2" in sentence
    assert "'https'" in sentence
    assert "443" in sentence


def test_without_root_the_exporter_polls_and_logs_why() -> None:
    """As nobody, ``auto`` uses sock_diag and logs one warning with the remedy."""
    with Peers("::") as peers:
        peers.connect(7, "127.0.0.1")
        peers.connect(5, "::1")
        with Command("--duration", "0", command=(*AS_NOBODY, COMMAND)) as exporter:
            page = exporter.get("/metrics")
            code, log = exporter.stop()
    assert 'tcpexporter_source_info{source="sock_diag"} 1.0' in page
    assert count(page, LONG_TERM, peers.port) == {"4": 7, "6": 5}
    assert code == 0
    (warning,) = (line for line in log.splitlines() if " INFO " not in line)
    assert "polling sock_diag, because ebpf does not work: " in warning
    assert "CAP_BPF" in warning
    assert "sudo" in warning


def test_without_root_ebpf_alone_is_refused() -> None:
    """``--source ebpf`` as nobody: exit code 1 and one sentence, no fallback."""
    ended = run(*AS_NOBODY, COMMAND, "--source=ebpf", f"--listen=127.0.0.1:{free_port()}")
    assert ended.returncode == 1
    assert ended.stdout == ""
    (sentence,) = (line for line in ended.stderr.splitlines() if " INFO " not in line)
    assert sentence.startswith("tcpexporter: ")
    assert "requires root" in sentence
    assert "sudo" in sentence


def test_the_log_begins_with_what_is_counted_and_ends_with_the_signal() -> None:
    """It also has the address of the status page, and the settings of the environment."""
    with (
        Peers() as peers,
        Command(
            "--netns", "self", command=("env", "TCPEXPORTER_PORT=443,5432", COMMAND)
        ) as exporter,
    ):
        peers.connect(3)
        code, log = exporter.stop()
    assert code == 0
    lines = [line.partition(" INFO tcpexporter: ")[2] for line in log.splitlines()]
    url = f"http://{exporter.target}/"
    assert [line for line in lines if line] == [
        "settings from the environment: TCPEXPORTER_PORT=443,5432",
        f"listening on {exporter.target.replace(':', ', port ')}",
        (
            "counting inbound connections of local ports 443, 5432, long-term from 6 s, by"
            " ebpf"
        ),
        "tracking 0 pre-existing connections of any direction and port",
        f"open {url} in a browser; Prometheus scrapes {url}metrics",
        (
            "next: --labels port,unit shows which service owns the connections,"
            " --histograms how old they are; --help lists all settings"
        ),
        "stopped by SIGTERM after 0:00:00",
    ]


def test_lines_for_the_journal_have_a_severity_and_no_time() -> None:
    """``journalctl -p warning`` finds the warning at the start, and the last error."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    environment = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    ended = subprocess.run(
        [COMMAND, "--source", "ebpf", "--simple", "--max-series", "7", "--listen", "-1"],
        check=False,
        stderr=writing,
        env=environment,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 2
    started = subprocess.run(
        [COMMAND, "--check", "--simple", "--max-series", "7"],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=writing,
        env=environment,
        timeout=DEADLINE_S,
    )
    assert started.returncode == 0
    os.close(writing)
    with os.fdopen(reading) as log:
        refused, warned = log.read().splitlines()
    assert refused.startswith("<3>tcpexporter: flag --listen: ")
    assert warned == "<4>tcpexporter: max-series has no effect with simple"


def test_check_says_what_would_run(tmp_path: Path) -> None:
    """It disturbs no exporter that runs: it neither pins nor saves ages. The port of that
    exporter is no error, because a new start can replace it."""
    state = tmp_path / "state"
    with Command("--state", str(state)) as running:
        ended = run(
            *(COMMAND, "--check", "--state", str(state), "--pin", "/sys/fs/bpf/unused"),
            *("--listen", running.target, "--direction", "all"),
            *("--expect", "db=remote=192.0.2.10:5432"),
        )
        assert running.is_ready()
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        (
            "would count inbound and outbound connections of every local port, long-term"
            " from 6 s, by ebpf"
        ),
        "would label each series with port, tcp_version",
        "would expect at least 1 connection for db: remote 192.0.2.10/32 port 5432",
        f"would serve http://{running.target}/",
        "would pin in /sys/fs/bpf/unused",
        f"would restore ages from {state}",
        (
            f"port {running.port} is in use by an exporter, which must end before another"
            " can start there"
        ),
    ]
    assert not Path("/sys/fs/bpf/unused").exists()


def test_check_without_root_accepts_a_port_in_use() -> None:
    """Only root can see that a process of another user is the exporter."""
    with Command() as running:
        ended = run(*AS_NOBODY, COMMAND, "--check", "--listen", running.target)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == (
        f"port {running.port} is in use; only root can see by which process"
    )


def test_check_refuses_what_the_start_would_refuse(tmp_path: Path) -> None:
    """Exit code 2 for an invalid setting or file, and 1 for what this host lacks."""
    config = tmp_path / "web.yml"
    config.write_text("basic_auth_users: {alice: secret}\n")
    port = f"--listen=127.0.0.1:{free_port()}"
    with socket.create_server(("127.0.0.1", 0)) as other:
        in_use = run(COMMAND, "--check", f"--listen=127.0.0.1:{other.getsockname()[1]}")
    for code, refused in (
        (2, run(COMMAND, "--check", "--port", "https")),
        (2, run(COMMAND, "--check", "--web-config", str(config))),
        (2, run(COMMAND, "--check", "--expect", "db=remote=database:5432")),
        (1, run(*AS_NOBODY, COMMAND, "--check", "--source=ebpf", port)),
        (1, run(COMMAND, "--check", port, "--state", str(tmp_path / "absent" / "state"))),
        (1, run(COMMAND, "--check", port, "--pin", "/sys/fs/bpf/absent/pin")),
        (1, in_use),
    ):
        assert refused.returncode == code
        assert refused.stdout == ""
        (sentence,) = refused.stderr.splitlines()
        assert sentence.startswith("tcpexporter: ")
