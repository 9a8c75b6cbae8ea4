# SPDX-License-Identifier: GPL-3.0-only
"""Tests ``--once --output``, with a real node_exporter that reads the file."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.support import COMMAND
from tests.e2e.test_command import INHERITED, count, objections, run
from tests.support import DEADLINE_S, LONG_TERM, Peers, eventually, free_port

MANY_PORTS = "1-1009"
"""Ports whose exposition is larger than a page of memory."""


@pytest.fixture
def textfiles(tmp_path: Path) -> Path:
    """Return a directory like that of Debian's node_exporter: only root can write."""
    directory = tmp_path / "textfiles"
    directory.mkdir()
    directory.chmod(0o755)
    return directory


def only(directory: Path) -> Path:
    """Return the only file in a directory."""
    (path,) = directory.iterdir()
    return path


@contextlib.contextmanager
def node_exporter(directory: Path) -> Iterator[str]:
    """Yield the URL of a node_exporter with no other collector than textfile."""
    names = ("prometheus-node-exporter", "node_exporter")
    command = next(filter(None, map(shutil.which, names)), None)
    if command is None:
        pytest.skip("node_exporter is not on PATH: Debian: prometheus-node-exporter")
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [
            command,
            "--collector.disable-defaults",
            "--collector.textfile",
            f"--collector.textfile.directory={directory}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield f"http://{address}/metrics"
        finally:
            process.kill()


def fetch(url: str) -> str:
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:  # noqa: S310
                page: str = response.read().decode()
                return page
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_node_exporter_serves_the_written_file(textfiles: Path) -> None:
    """Node_exporter reports no error after each of two runs with different settings.

    The kind of fault: an error at each scrape, because node_exporter has a metric of the
    same name, or because a help text has changed.
    """
    with Peers() as peers, node_exporter(textfiles) as url:
        peers.connect(7)
        for duration_s in ("0", "1"):
            output = str(textfiles / "tcpexporter.prom")
            ended = run(COMMAND, "--once", "--duration", duration_s, "--output", output)
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
            written = only(textfiles)
            assert written.stat().st_mode & 0o7777 == 0o644
            assert objections(written.read_text()) == [INHERITED]
            for page in (fetch(url), fetch(url)):
                assert "\nnode_textfile_scrape_error 0\n" in page
                assert 'promhttp_metric_handler_errors_total{cause="gathering"} 0\n' in page
                assert f"\ntcpexporter_duration_seconds {duration_s}\n" in page
                assert page.count("# TYPE process_start_time_seconds") == 1
                assert count(page, LONG_TERM, peers.port) == {"4": 7}


def test_without_root_the_file_is_written_to_an_own_directory(tmp_path: Path) -> None:
    """The owner of a directory can write there; in another directory it is an error."""
    nobody = 65534
    as_nobody = ("setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups")
    # The tests and the parents of the directory may be readable by root only.
    reading = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    command = (
        *as_nobody,
        *reading,
        COMMAND,
        "--once",
        "--duration",
        "0",
        "--source=procfs",
    )
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", nobody, nobody)
    ended = run(*command, "--output", str(tmp_path / "own" / "x.prom"))
    assert ended.returncode == 0, ended.stderr
    assert only(tmp_path / "own").stat().st_uid == nobody
    ended = run(*command, "--output", str(tmp_path / "x.prom"))
    assert ended.returncode == 1
    assert (
        ended.stderr == f"tcpexporter: cannot write {tmp_path}/x.prom: Permission denied\n"
    )


def test_a_signal_during_the_wait_leaves_the_old_file(textfiles: Path) -> None:
    """The old file is unchanged, no other file is left, and the exit code is not 0."""
    path = textfiles / "x.prom"
    path.write_text("old 1\n")
    command = [COMMAND, "--once", "--duration", "600", "--output", str(path)]
    with subprocess.Popen(command, start_new_session=True) as watching:
        try:
            eventually(lambda: len(list(textfiles.iterdir())) == 2)
            # Like Ctrl-C, this sends SIGINT to the child process too.
            os.killpg(watching.pid, signal.SIGINT)
            watching.wait(DEADLINE_S)
        finally:
            watching.kill()
    assert watching.returncode != 0
    eventually(lambda: only_names(textfiles) == ["x.prom"])
    assert path.read_text() == "old 1\n"


def only_names(directory: Path) -> list[str]:
    return [each.name for each in directory.iterdir()]


def test_a_full_disk_leaves_the_old_file(textfiles: Path) -> None:
    """The error is one sentence, with exit code 1."""
    script = (
        f"mount -t tmpfs -o size=8k none {textfiles}; cd {textfiles}; echo old 1 >x.prom;"
        f" {COMMAND} --once --duration 0 --source procfs --port {MANY_PORTS}"
        " --output x.prom; echo $?; ls -A; cat x.prom"
    )
    ended = run("unshare", "--mount", "sh", "-c", script)
    assert ended.stdout == "1\nx.prom\nold 1\n"
    assert ended.stderr == "tcpexporter: cannot write x.prom: No space left on device\n"
    assert only_names(textfiles) == []


def test_a_failed_start_leaves_the_old_file(textfiles: Path) -> None:
    """The source fails after the new file was opened."""
    path = textfiles / "x.prom"
    path.write_text("old 1\n")
    ended = run(
        *("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin", COMMAND, "--once"),
        *("--source", "ebpf", "--duration", "0", "--output", str(path)),
    )
    assert ended.returncode == 1
    assert only_names(textfiles) == ["x.prom"]
    assert path.read_text() == "old 1\n"


def test_output_without_once_is_refused(textfiles: Path) -> None:
    """The file would never be written: exit code 2, and the remedy."""
    ended = run(COMMAND, "--output", str(textfiles / "x.prom"))
    assert ended.returncode == 2
    assert re.fullmatch(
        "tcpexporter: flag --output: output requires once: .*\n", ended.stderr
    )
    assert only_names(textfiles) == []
