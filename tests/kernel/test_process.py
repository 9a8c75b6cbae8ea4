# SPDX-License-Identifier: GPL-3.0-only
"""The process: its privileges, its end, and the errors when it cannot start."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tcpexporter.ebpf import features
from tcpexporter.ebpf.features import Kernel
from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.host import privileges
from tests.kernel.helpers.in_process import all_connections, invented, words_at
from tests.kernel.helpers.loader_child import wait_for_loader
from tests.kernel.helpers.shared import BOTH_ENDS, OUTBOUND, Exporters
from tests.support import (
    DEADLINE_S,
    Exporter,
    Peers,
    bpf_programs_by_id,
    bpf_programs_of,
    eventually,
)

OURS = "on_state_change"
NOBODY = 65534


def status(process: int, thread: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{process}/task/{thread}/status").read_text().splitlines()
    return {
        name: value.split() for name, _, value in (line.partition(":") for line in lines)
    }


def threads(process: int) -> list[int]:
    return [int(each.name) for each in Path(f"/proc/{process}/task").iterdir()]


def statuses(process: int) -> list[dict[str, list[str]]]:
    """Return the status of each thread.

    A thread that ends meanwhile is left out, such as the one that read pre-existing
    connections. The main thread may not end.
    """
    found = [status(process, process)]
    for each in {*threads(process)} - {process}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(status(process, each))
    return found


def wait_until_programs_are_gone(programs: set[int]) -> None:
    """Wait until the kernel has freed the programs, which may be after the process is
    reaped."""
    eventually(lambda: not programs & bpf_programs_by_id().keys())


def test_root_is_dropped_permanently(exporters: Exporters) -> None:
    """No thread has a root id, a group or a capability, or can regain one.

    The exception is CAP_BPF if the kernel requires it for reading maps; a program that the
    process executes does not inherit it.
    """
    is_kept = not Kernel().has(features.UNPRIVILEGED_MAPS)
    assert_root_is_dropped(
        exporters(*BOTH_ENDS), kept=1 << privileges.CAP_BPF if is_kept else 0
    )


def assert_root_is_dropped(exporter: Exporter, *, kept: int) -> None:
    for shown in statuses(exporter.process.pid):
        assert shown["Uid"] == [str(NOBODY)] * 4
        assert shown["Gid"] == [str(NOBODY)] * 4
        assert shown["Groups"] == []
        for held in ("CapInh", "CapBnd", "CapAmb"):
            assert int(shown[held][0], 16) == 0, held
        for held in ("CapPrm", "CapEff"):
            assert int(shown[held][0], 16) == kept, held
        assert shown["NoNewPrivs"] == ["1"]


def test_the_user_can_be_chosen(exporters: Exporters) -> None:
    """The exporter switches to the user that ``--user`` names."""
    assert OUTBOUND[-2:] == ("--user", "daemon")
    pid = exporters(*OUTBOUND).process.pid
    assert status(pid, pid)["Uid"] == ["1"] * 4


@pytest.mark.any_kernel
def test_processes_of_its_user_cannot_read_its_memory(exporters: Exporters) -> None:
    """Other daemons run as nobody too: they can read neither its memory nor its files."""
    pid = exporters(*BOTH_ENDS).process.pid
    nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    for name in ("maps", "mem", "environ", "fdinfo/0"):
        looked = subprocess.run(
            [*nobody, "cat", f"/proc/{pid}/{name}"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert looked.stdout == ""
        assert "Permission denied" in looked.stderr


def test_the_serving_process_does_not_map_bcc(exporters: Exporters) -> None:
    """Neither BCC nor LLVM is mapped, and the child process that loaded them has ended."""
    pid = exporters(*BOTH_ENDS).process.pid
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libbpf" in maps
    assert "libbcc" not in maps
    assert "LLVM" not in maps
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_maps_can_be_used_without_privilege(tracker: Tracker) -> None:
    """After all privileges are dropped, maps can be read and changed by descriptor."""
    child = os.fork()
    if child == 0:
        outcome = 1
        with contextlib.suppress(BaseException):
            privileges.drop(privileges.find_user("nobody"), tracker.events)
            slots = tracker.add(invented(7))
            tracker.release(slots[:2], words_at(tracker, slots[:2]))
            tracker.events()
            outcome = (
                0
                if tracker.seeds(tracker.events()) == len(all_connections(tracker)) == 5
                else 2
            )
        os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_exporter_normally(number: signal.Signals) -> None:
    """Exit code 0; standard error has the log only, and no program stays in the kernel."""
    with Exporter("--source", "ebpf") as exporter:
        programs = bpf_programs_of(exporter.process.pid)
        assert [bpf_programs_by_id()[each] for each in programs] == [OURS]
        with socket.create_connection(("127.0.0.1", exporter.port)):
            exporter.process.send_signal(number)
            _, complaints = exporter.process.communicate(timeout=DEADLINE_S)
        assert exporter.process.returncode == 0
        assert "Traceback" not in complaints
    wait_until_programs_are_gone(programs)


@pytest.mark.any_kernel
@pytest.mark.parametrize("part", [0, 0.3, 0.7])
def test_a_signal_during_loading_ends_the_exporter_normally(
    load_s: float, part: float
) -> None:
    """At any step of the loader, the exporter ends with 0, and no program stays."""
    with Exporter("--source", "ebpf", wait=False) as exporter:
        child = wait_for_loader(exporter.process.pid)
        time.sleep(part * load_s)
        programs = bpf_programs_of(exporter.process.pid) | bpf_programs_of(child)
        code, complaints = exporter.stop()
        assert code == 0, complaints
        assert "Traceback" not in complaints
    # The exporter does not wait for a loader that has just begun. The loader ends when its
    # socket to the exporter is closed.
    eventually(lambda: not Path(f"/proc/{child}").exists())
    wait_until_programs_are_gone(programs)


@pytest.mark.any_kernel
def test_a_signal_right_after_the_start_ends_the_exporter() -> None:
    """The signal kills it if Python does not handle signals yet; otherwise it exits with
    0."""
    with Exporter("--source", "ebpf", wait=False) as exporter:
        code, complaints = exporter.stop()
        assert code in {0, -signal.SIGTERM}, complaints
        assert "Traceback" not in complaints


def test_a_killed_exporter_leaves_no_program_in_the_kernel() -> None:
    """SIGKILL closes the descriptors, and the kernel then frees program and maps."""
    with Exporter("--source", "ebpf") as exporter:
        programs = bpf_programs_of(exporter.process.pid)
        assert len(programs) == 1
        exporter.process.kill()
    wait_until_programs_are_gone(programs)


COMMAND = (sys.executable, "-m", "tcpexporter")
AS_NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    # The source tree may be readable by root only.
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    *COMMAND,
)


def refused(*arguments: str, command: tuple[str, ...] = COMMAND) -> tuple[int, str]:
    """Run an exporter that cannot start; return its exit code and its last line."""
    ended = subprocess.run(
        [*command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr.splitlines()[-1]


@pytest.mark.any_kernel
def test_a_port_in_use_is_refused() -> None:
    """Exit code 1, and one sentence with the port and the remedy."""
    with Peers() as peers:
        code, sentence = refused("--listen", f"127.0.0.1:{peers.port}")
    assert code == 1
    assert f"port {peers.port} is already in use" in sentence
    assert "--listen" in sentence


@pytest.mark.any_kernel
def test_an_unknown_user_is_refused() -> None:
    """Exit code 2 before anything is loaded, and a sentence with the flag to set."""
    code, sentence = refused("--user", "no-such-user")
    assert code == 2
    assert "no user 'no-such-user'" in sentence
    assert "--user" in sentence


@pytest.mark.any_kernel
def test_the_user_root_is_refused() -> None:
    """The setting is invalid: exit code 2, after which systemd does not restart the
    exporter."""
    assert refused("--user", "root")[0] == 2


@pytest.mark.any_kernel
def test_a_named_source_that_does_not_work_is_refused() -> None:
    """``--source ebpf`` without privilege: exit code 1 and the remedy, without a
    fallback."""
    code, sentence = refused("--source", "ebpf", command=AS_NOBODY)
    assert code == 1
    assert "requires root" in sentence
    assert "sudo" in sentence


@pytest.mark.any_kernel
def test_auto_logs_why_it_polls() -> None:
    """One warning has the source in use, the reason, and the remedy."""
    with Exporter(command=AS_NOBODY) as exporter:
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        code, complaints = exporter.stop()
    assert code == 0
    warnings = [line for line in complaints.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "polling sock_diag, because ebpf does not work" in warnings[0]
    assert "sudo" in warnings[0]


@pytest.mark.parametrize("source", ["sock_diag", "procfs"])
def test_polling_sources_give_the_same_counts(source: str) -> None:
    """A connection's age begins with the first poll that found it.

    The polling sources drop root too.
    """
    # This exporter is not shared, because polling uses CPU until it ends.
    arguments = ("--source", source, "--interval", "0.1", "--duration", "1")
    with Peers("::") as peers, Exporter(*arguments) as exporter:
        assert_root_is_dropped(exporter, kept=0)
        opened_s = time.monotonic()
        peers.connect(7, "127.0.0.1")
        peers.connect(5, "::1")
        eventually(lambda: exporter.established(peers.port, 4) == 7)
        eventually(lambda: exporter.established(peers.port, 6) == 5)
        assert exporter.value("tcpexporter_source_info", source=source) == 1
        eventually(lambda: exporter.long_term(peers.port, 4) == 7)
        assert time.monotonic() - opened_s >= 1
        eventually(lambda: exporter.long_term(peers.port, 6) == 5)
        peers.pairs[0][1].close()
        eventually(lambda: exporter.established(peers.port, 4) == 6)
        assert exporter.value("tcpexporter_kernel_events_total", action="inserted") is None


@pytest.mark.any_kernel
@pytest.mark.parametrize("output", [">/dev/full", "| true", ">&-"])
def test_once_reports_that_it_cannot_write_its_output(output: str) -> None:
    """A full disk, a closed pipe, or no standard output: one sentence, exit code 1."""
    once = f"{' '.join(COMMAND)} --once --duration 0"
    script = f"set -o pipefail; {once} {output}"
    ended = subprocess.run(
        ["bash", "-c", script],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 1
    assert "cannot write to standard output" in ended.stderr
    assert "Traceback" not in ended.stderr


def is_nobody(process: int) -> bool:
    return status(process, process)["Uid"] == [str(NOBODY)] * 4


def catches(process: int, number: signal.Signals) -> bool:
    return bool(int(status(process, process)["SigCgt"][0], 16) >> (number - 1) & 1)


@pytest.mark.any_kernel
def test_an_interrupted_once_has_a_nonzero_exit_code() -> None:
    """A signal during the wait ends it, and it prints nothing."""
    command = (*COMMAND, "--once", "--duration", "600")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as once:
        try:
            eventually(
                lambda: is_nobody(once.pid) and not catches(once.pid, signal.SIGTERM)
            )
            once.terminate()
            page, _ = once.communicate(timeout=DEADLINE_S)
        finally:
            once.kill()
    assert page == b""
    assert once.returncode not in (0, None)


UNREADABLE = """
set -e
mount -t tmpfs -o mode=0700 none /mnt
mkdir /mnt/venv
mount --bind "$0" /mnt/venv
exec /mnt/venv/bin/python -m tcpexporter "$@"
"""


@pytest.mark.any_kernel
def test_the_installation_may_be_readable_by_root_only() -> None:
    """It may be below /root: no module is imported after root is dropped."""
    command = ("unshare", "--mount", "sh", "-c", UNREADABLE, sys.prefix)
    with Peers() as peers, Exporter(command=command) as exporter:
        peers.connect(3)
        assert exporter.established(peers.port) == 3
        assert "tcpexporter" in exporter.get("/")
        openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
        headers = openmetrics | {"Accept-Encoding": "gzip"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{exporter.port}/metrics", headers=headers
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:  # noqa: S310
            assert response.headers["Content-Encoding"] == "gzip"
        code, complaints = exporter.stop()
    assert code == 0
    assert "Traceback" not in complaints
    assert "Error" not in complaints
