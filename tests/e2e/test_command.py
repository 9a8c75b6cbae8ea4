# SPDX-License-Identifier: GPL-3.0-only
"""The installed command: output, settings, and running without root."""

import html
import os
import pty
import re
import select
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
    """promtool's objections to an exposition; it ignores families without samples."""
    checked = run(tool("promtool"), "check", "metrics", given=page)
    return (checked.stdout + checked.stderr).splitlines()


def count(page: str, metric: str, port: int) -> dict[str, float]:
    """The values of a port in an exposition, by IP version."""
    return {
        sample.labels["tcp_version"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == metric and sample.labels["port"] == str(port)
    }


def read_terminal(controller: int, last: str | None = None) -> str:
    """Read a terminal up to ``last``, or until its other side is closed."""
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
    """Return the settings in the table of the landing page."""
    rows = re.findall('<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page)
    return {html.unescape(name): html.unescape(value) for name, value in rows}


@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_promtool_objects_to_the_inherited_name_only(source: str) -> None:
    """``promtool check metrics`` on an exposition of each source, with series."""
    with Peers("::") as peers, Command("--source", source) as exporter:
        peers.connect(1)
        assert objections(exporter.get("/metrics")) == [INHERITED]


def test_promtool_objects_to_the_inherited_name_only_when_simple() -> None:
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
    """Flags override environment, environment overrides file; the landing page shows it."""
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
    assert shown["ports"] == "443"
    assert shown["duration_s"] == "11"
    assert shown["direction"] == "inbound"
    assert shown["tcpv6"] == "True"
    assert shown["max_connections"] == "1009"
    assert shown["conf"] == str(conf)
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
