# SPDX-License-Identifier: GPL-3.0-only
"""Faults that the tests cause, and the documented reaction of the exporter."""

import contextlib
import ctypes
import http.client
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest

from tcpexporter.ebpf.tracker import Tracker
from tcpexporter.errors import LoadError
from tests.kernel.helpers.in_process import at_port, attach
from tests.kernel.helpers.loader_child import kill_loader, loader_is_killed
from tests.kernel.helpers.resource_limits import limit, pids_cgroup
from tests.kernel.helpers.second_program import Counter
from tests.kernel.helpers.system_calls import NUMBERS
from tests.support import (
    DEADLINE_S,
    ESTABLISHED,
    LONG_TERM,
    Exporter,
    Peers,
    eventually,
    free_port,
)

COMMAND = f"{sys.executable} -m tcpexporter"


def in_own_mounts(preparation: str) -> tuple[str, ...]:
    """Return a command that prepares mounts for the exporter alone, then runs it."""
    script = f'set -e; {preparation}; exec {COMMAND} "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


WITHOUT_BTF = in_own_mounts("mount --bind /dev/null /sys/kernel/btf/vmlinux")
WITHOUT_TRACEFS = in_own_mounts(
    "mount -t tmpfs none /sys/kernel/tracing; mount -t tmpfs none /sys/kernel/debug"
)
WITHOUT_PROC = in_own_mounts("mount -t tmpfs none /proc")


def refused(command: tuple[str, ...], *arguments: str) -> str:
    """Run a command that cannot start the exporter; return the last line of its output."""
    ended = subprocess.run(
        [*command, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.any_kernel
def test_without_btf_the_error_names_polling() -> None:
    """Loading requires the kernel's types; the error suggests --source sock_diag."""
    sentence = refused(WITHOUT_BTF, "--source", "ebpf")
    assert "no BTF" in sentence
    assert "--source sock_diag" in sentence


def test_without_btf_auto_polls() -> None:
    """``--source auto`` falls back to polling, and its warning has the same reason."""
    with Exporter(command=WITHOUT_BTF) as exporter, Peers() as peers:
        peers.connect(3)
        eventually(lambda: exporter.established(peers.port) == 3)
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        _, complaints = exporter.stop()
    assert "no BTF" in complaints


def test_tracefs_is_not_required() -> None:
    """A minimal host has neither tracefs nor debugfs mounted."""
    arguments = ("--source", "ebpf")
    with Exporter(*arguments, command=WITHOUT_TRACEFS) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3


@pytest.mark.any_kernel
def test_without_proc_there_is_an_error() -> None:
    """If /proc cannot be read, the exporter ends with one sentence."""
    assert "/proc/" in refused(WITHOUT_PROC, "--source", "procfs")


def deny_netlink() -> None:
    """Make the kernel refuse netlink sockets to this process, with seccomp(2)."""
    load, jump, returning = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allowed, denied = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, ERRNO | EPERM
    program = (
        (load, 0, 0, 0),  # the number of the system call
        (jump, 0, 3, NUMBERS["socket"]),
        (load, 0, 0, 16),  # its first argument
        (jump, 0, 1, socket.AF_NETLINK),
        (returning, 0, 0, denied),
        (returning, 0, 0, allowed),
    )
    code = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *each) for each in program)
    )
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.c_char_p(filter_), 0, 0) == 0  # PR_SET_SECCOMP, FILTER


DENY_AND_RUN = """
from tcpexporter.__main__ import main
from tests.kernel.test_faults import deny_netlink
deny_netlink()
main()
"""
WITHOUT_NETLINK = (sys.executable, "-c", DENY_AND_RUN)


@pytest.mark.any_kernel
def test_without_sock_diag_proc_net_tcp_is_read() -> None:
    """If netlink is refused, pre-existing connections come from /proc/net/tcp."""
    with Peers() as peers:
        peers.connect(7)
        with Exporter("--source", "ebpf", command=WITHOUT_NETLINK) as exporter:
            peers.connect(4)
            assert exporter.established(peers.port) == 11
            _, complaints = exporter.stop()
    assert "reading /proc/net/tcp instead of sock_diag" in complaints


@pytest.mark.any_kernel
def test_a_named_sock_diag_source_does_not_fall_back() -> None:
    """``--source sock_diag`` ends with exit code 1 if netlink is refused."""
    assert "sock_diag" in refused(WITHOUT_NETLINK, "--source", "sock_diag")


@pytest.mark.any_kernel
@pytest.mark.parametrize("part", [0, 0.2, 0.4, 0.6, 0.8])
def test_a_killed_loader_leaves_no_half_loaded_program(load_s: float, part: float) -> None:
    """Its parent process reports that the loader died, unless the loader had already
    finished."""
    with loader_is_killed(part * load_s):
        tracker, reason = attach_or_reason()
    if tracker is None:
        assert "died" in reason
        return
    with contextlib.closing(tracker), Peers() as peers:
        peers.connect(3)
        assert len(at_port(tracker, peers.port)) == 3


def attach_or_reason() -> tuple[Tracker | None, str]:
    try:
        return attach(), ""
    except LoadError as error:
        return None, str(error)


@pytest.mark.any_kernel
def test_a_killed_loader_ends_the_exporter() -> None:
    """The exporter ends with one sentence and exit code 1."""
    with Exporter("--source", "ebpf", wait=False) as exporter:
        kill_loader(exporter.process.pid, after_s=0)
        _, complaints = exporter.process.communicate(timeout=DEADLINE_S)
        assert exporter.process.returncode == 1
        assert "Traceback" not in complaints
        assert "died" in complaints


def test_ages_are_right_in_a_time_namespace() -> None:
    """A container's CLOCK_BOOTTIME may be days ahead of the kernel's timestamps."""
    ahead = ("unshare", "--time", "--fork", "--kill-child", "--boottime", "86400")
    command = (*ahead, *COMMAND.split())
    with Peers() as peers:
        peers.connect(3)
        with Exporter("--duration", "3600", command=command) as exporter:
            peers.connect(4)
            assert exporter.established(peers.port) == 7
            assert exporter.long_term(peers.port) == 0


def descriptors(exporter: Exporter) -> int:
    return len(list(Path(f"/proc/{exporter.process.pid}/fd").iterdir()))


def ask_on(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200, page
    return page


@pytest.mark.any_kernel
def test_new_clients_wait_while_no_descriptor_is_free() -> None:
    """Connected clients are served and one warning is logged. New clients are served
    when a descriptor is free."""
    with Exporter("--source", "ebpf") as exporter, Peers() as peers:
        kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE_S)
        ask_on(kept)
        limit(exporter, f"--nofile={descriptors(exporter)}:")
        answers: list[str] = []
        late = threading.Thread(target=lambda: answers.append(exporter.get("/metrics")))
        late.start()
        began_s = cpu_s(exporter)
        for number in range(1, 4):
            time.sleep(0.7)  # asyncio tries to accept once a second
            peers.connect(1)
            count = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}} {number}.0'
            assert count in ask_on(kept)
        assert cpu_s(exporter) - began_s < 1
        assert answers == []
        limit(exporter, "--nofile=1024:")
        late.join(DEADLINE_S)
        assert len(answers) == 1
        assert exporter.established(peers.port) == 3
        kept.close()
        code, log = exporter.stop()
    assert code == 0
    assert log.count("cannot accept new clients") == 1
    assert "Traceback" not in log


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["sock_diag", "procfs"])
def test_polling_continues_while_no_descriptor_is_free(source: str) -> None:
    """The fault: the polling thread ended, because it listed a directory after each
    poll."""
    arguments = ("--source", source, "--interval", "0.1")
    with Exporter(*arguments) as exporter, Peers() as peers:
        kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE_S)
        ask_on(kept)
        limit(exporter, f"--nofile={descriptors(exporter)}:")
        peers.connect(7)
        count = f'{ESTABLISHED}{{port="{peers.port}",tcp_version="4"}} 7.0'
        eventually(lambda: count in ask_on(kept))
        kept.close()


def cpu_s(exporter: Exporter) -> float:
    """Return the CPU time that the exporter has used: proc_pid_stat(5)."""
    shown = Path(f"/proc/{exporter.process.pid}/stat").read_text().rpartition(")")[2]
    return sum(map(int, shown.split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_without_free_memory_the_answer_is_503(source: str) -> None:
    """The response has one sentence. Scrapes and threads work again when memory is
    available."""
    arguments = ("--source", source, "--interval", "0.1", "--reconcile-interval", "1")
    with Exporter(*arguments) as exporter, Peers() as peers:
        peers.connect(3)
        eventually(lambda: exporter.established(peers.port) == 3)
        limit(exporter, "--as=1048576:")
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as refused:
                exporter.get("/metrics")
            assert refused.value.code == 503
            assert b"not enough memory" in refused.value.read()
            peers.connect(1)
            time.sleep(0.4)  # until the threads have failed too
        limit(exporter, "--as=unlimited")
        eventually(lambda: is_established(exporter, peers.port, 6))
        if source == "ebpf":
            runs = exporter.value("tcpexporter_reconciliations_total")
            peers.connect(1)
            eventually(lambda: exporter.value("tcpexporter_reconciliations_total") != runs)
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log
    assert log.count("cannot collect metrics: there is not enough memory") == 1
    spells = log.count("reconcile: the thread works again") + 1
    assert log.count("reconciliation failed: ") <= spells


def is_established(exporter: Exporter, port: int, number: int) -> bool:
    with contextlib.suppress(urllib.error.HTTPError):
        return exporter.established(port) == number
    return False


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_counting_continues_while_no_thread_can_start(source: str) -> None:
    """The fault: the polling thread ended, because a dump of many sockets started a
    thread."""
    arguments = ("--source", source, "--interval", "0.1", "--reconcile-interval", "1")
    with pids_cgroup() as pids, Peers() as peers:
        peers.connect(3001)
        with Exporter(*arguments, command=pids.within((*COMMAND.split(),))) as exporter:
            eventually(lambda: exporter.established(peers.port) == 3001)
            pids.allow("1")
            peers.connect(7)
            eventually(lambda: exporter.established(peers.port) == 3008)
            if source == "ebpf":
                wait_for_reconciliation(exporter)
            for pair in peers.pairs[:2003]:
                for each in pair:
                    each.close()
            eventually(lambda: exporter.established(peers.port) == 1005)
            if source == "ebpf":
                wait_for_reconciliation(exporter)
            for task in ("reconcile" if source == "ebpf" else "poll", "reload"):
                assert exporter.value(FAILURES, task=task) == 0
            code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


FAILURES = "tcpexporter_background_failures_total"


def wait_for_reconciliation(exporter: Exporter) -> None:
    """Wait until a reconciliation that begins after this call has ended."""
    runs = exporter.value("tcpexporter_reconciliations_total") or 0
    eventually(
        lambda: (exporter.value("tcpexporter_reconciliations_total") or 0) >= runs + 2
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
@pytest.mark.parametrize("most", ["1", "2", "3"])
def test_too_few_threads_end_the_start_with_a_remedy(source: str, most: str) -> None:
    """One sentence names the limit to raise, without a traceback or endless 503 answers."""
    with pids_cgroup() as pids:
        command = pids.within(
            (*COMMAND.split(), "--listen", f"127.0.0.1:{free_port()}"), most
        )
        sentence = refused(command, "--source", source)
        assert "raise the limit of processes and threads: TasksMax= of the unit" in sentence
        assert pids.refused() > 0


POLL_FAILS = """
import threading
from tcpexporter.socket_tables import polling
from tcpexporter.__main__ import main
polling.first_seen = lambda now, before: {fault}
{limit}
main()
"""


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("fault", "limit", "error"),
    [
        ("1 / 0", "", "ZeroDivisionError: division by zero"),
        (
            "threading.Event().wait()",
            "polling.LIMIT_S = polling.STOP_TIMEOUT_S = 0.2",
            "the thread poll hangs",
        ),
    ],
)
def test_a_poll_that_fails_or_hangs_gives_503(fault: str, limit: str, error: str) -> None:
    """After an unexpected fault scrapes fail, there are two log lines, and the exporter
    still ends normally."""
    command = (sys.executable, "-c", POLL_FAILS.format(fault=fault, limit=limit))
    arguments = ("--source", "sock_diag", "--interval", "0.1")
    with Exporter(*arguments, command=command) as exporter:
        eventually(lambda: error in error_of_scrape(exporter))
        for _ in range(3):
            assert error_of_scrape(exporter).startswith(f"503 {error}")
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log
    assert log.count("cannot count connections: ") == 1
    assert log.count("cannot collect metrics: ") == 1


def error_of_scrape(exporter: Exporter) -> str:
    """Scrape, and return status and text of an error; an empty string if there is none."""
    try:
        exporter.get("/metrics")
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    return ""


WITH_TRACEFS = in_own_mounts(
    "mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing"
)


def within_mounts(exporter: Exporter, *command: str) -> None:
    """Run a command in the exporter's mount namespace."""
    target = f"--target={exporter.process.pid}"
    subprocess.run(["nsenter", target, "--mount", *command], check=True)


def test_counting_continues_after_tracefs_is_unmounted() -> None:
    """The program stays attached."""
    with Exporter("--source", "ebpf", command=WITH_TRACEFS) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3
        within_mounts(exporter, "umount", "--lazy", "/sys/kernel/tracing")
        peers.connect(4)
        assert exporter.established(peers.port) == 7
        assert exporter.value("tcpexporter_kernel_events_total", action="refused") == 0


READ_ONLY = in_own_mounts(
    "cut -d ' ' -f 5 /proc/self/mountinfo | sort -u |"
    ' while read -r each; do mount -o remount,bind,ro "$each" || true; done;'
    " ! touch /tmp/x; ! touch /dev/shm/x; ! touch /run/x"
)


@pytest.mark.any_kernel
def test_no_writable_file_system_is_required(tmp_path: Path) -> None:
    """Every file system is read-only, including /tmp and /run."""
    conf = tmp_path / "conf"
    conf.write_text("duration 0\n")
    arguments = ("--source", "ebpf", "--conf", str(conf))
    with Exporter(*arguments, command=READ_ONLY) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.long_term(peers.port) == 3
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


def logging_to(output: str) -> tuple[str, ...]:
    return ("sh", "-c", f'exec {COMMAND} "$@" {output}', "sh")


@pytest.mark.any_kernel
@pytest.mark.parametrize("output", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_a_log_that_cannot_be_written_stops_nothing(output: str) -> None:
    """The disk is full, or standard error is closed; the exporter works nevertheless."""
    arguments = ("--source", "ebpf", "--log-level", "debug")
    with Exporter(*arguments, command=logging_to(output)) as exporter, Peers() as peers:
        peers.connect(3)
        for _ in range(3):
            exporter.process.send_signal(signal.SIGHUP)  # each signal logs a line
            assert exporter.established(peers.port) == 3
        assert exporter.stop()[0] == 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("output", ["2>/dev/full", "2>&-"])
def test_the_exit_code_does_not_depend_on_the_log(output: str) -> None:
    """An invalid setting gives exit code 2 although its error cannot be written."""
    command = [*logging_to(output), "--port", "x"]
    ended = subprocess.run(command, check=False, timeout=DEADLINE_S)
    assert ended.returncode == 2


@pytest.mark.any_kernel
def test_the_log_continues_when_the_disk_has_space_again(tmp_path: Path) -> None:
    """The file only has whole lines, which were logged when there was space."""
    tmp_path.chmod(0o755)
    log = tmp_path / "log"
    small = ("unshare", "--mount", "sh", "-c")
    script = (
        f"mount -t tmpfs -o size=64k none {tmp_path};"
        f" head -c 64k /dev/zero >{tmp_path}/fill;"
        f' exec {COMMAND} "$@" 2>{log}'
    )
    with Exporter("--source", "sock_diag", command=(*small, script, "sh")) as exporter:
        for _ in range(7):
            exporter.process.send_signal(signal.SIGHUP)
            exporter.get("/metrics")
        seen = f"/proc/{exporter.process.pid}/root{log}"
        assert Path(seen).read_text() == ""
        Path(f"/proc/{exporter.process.pid}/root{tmp_path}/fill").unlink()
        eventually(lambda: has_logged(exporter, seen, "SIGHUP has no effect"))
        for line in Path(seen).read_text().splitlines():
            assert re.search(" (INFO|WARNING) tcpexporter", line), line


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
def test_a_full_log_pipe_does_not_block_the_exporter(source: str, tmp_path: Path) -> None:
    """Lines are dropped and counted while no process reads the pipe.

    When a process reads it again, lines are written again.
    """
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fill(reader)
    arguments = ("--source", source, "--log-level", "debug")
    with (
        Exporter(*arguments, command=logging_to(f"2>{fifo}")) as exporter,
        Peers() as peers,
    ):
        peers.connect(7)
        for _ in range(3):
            exporter.process.send_signal(signal.SIGHUP)  # each signal logs a line
            eventually(lambda: exporter.established(peers.port) == 7)
        dropped = exporter.value("tcpexporter_dropped_log_lines_total")
        assert dropped
        drain(reader)
        exporter.process.send_signal(signal.SIGHUP)
        shown = ""
        while "SIGHUP has no effect" not in shown:
            select.select([reader], [], [], DEADLINE_S)
            shown += drain(reader)
        fill(reader)
        assert exporter.stop()[0] == 0
    ended = subprocess.run(
        [*logging_to(f"2>{fifo}"), "--port", "x"], check=False, timeout=DEADLINE_S
    )
    assert ended.returncode == 2
    os.close(reader)


def fill(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(select.PIPE_BUF))


def drain(pipe: int) -> str:
    text = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            text += os.read(pipe, 1 << 20)
    return text.decode()


def has_logged(exporter: Exporter, log: str, words: str) -> bool:
    exporter.process.send_signal(signal.SIGHUP)
    return words in Path(log).read_text()


ADDRESS = "10.99.0.1"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def make_interface() -> None:
    ip("link", "add", "tcpe0", "type", "bridge")
    ip("link", "set", "tcpe0", "up")
    ip("address", "add", f"{ADDRESS}/24", "dev", "tcpe0")


@pytest.mark.any_kernel
def test_the_listen_address_may_disappear_and_return() -> None:
    """The exporter continues without a message, and can be reached when the address is
    back."""
    make_interface()
    with Exporter("--source", "ebpf", address=ADDRESS) as exporter, Peers() as peers:
        ip("link", "delete", "tcpe0")
        with pytest.raises(OSError, match="unreachable"):
            socket.create_connection((ADDRESS, exporter.port), timeout=DEADLINE_S)
        peers.connect(3)
        assert exporter.process.poll() is None
        make_interface()
        assert exporter.established(peers.port) == 3
        code, log = exporter.stop()
    assert code == 0
    assert "WARNING" not in log
    assert "ERROR" not in log


@pytest.mark.any_kernel
def test_other_programs_at_the_tracepoint_take_no_events() -> None:
    """One attaches before ours, one after ours, and one detaches; each program gets
    every event."""
    with Counter() as before, Exporter("--source", "ebpf") as exporter, Peers() as peers:
        peers.connect(101)
        with Counter() as after:
            peers.connect(103)
            eventually(lambda: exporter.established(peers.port) == 204)
            assert before.established(peers.port) == 204
            assert after.established(peers.port) == 103
        peers.connect(107)
        eventually(lambda: exporter.established(peers.port) == 311)
        assert before.established(peers.port) == 311
        before.close()
        peers.connect(109)
        eventually(lambda: exporter.established(peers.port) == 420)


@pytest.mark.any_kernel
def test_a_stopped_exporter_misses_no_event() -> None:
    """Between SIGSTOP and SIGCONT connections open and close; their ages are right."""
    arguments = ("--source", "ebpf", "--duration", "2")
    with Exporter(*arguments) as exporter, Peers() as peers:
        peers.connect(11)
        exporter.process.send_signal(signal.SIGSTOP)
        peers.connect(7)
        for pair in peers.pairs[:5]:
            for each in pair:
                each.close()
        time.sleep(2.5)
        peers.connect(3)
        exporter.process.send_signal(signal.SIGCONT)
        page = exporter.samples()
        at = (("port", str(peers.port)), ("tcp_version", "4"))
        assert page[ESTABLISHED, at] == 16
        assert page[LONG_TERM, at] == 13
        assert page["tcpexporter_corrections_total", (("kind", "missed_open"),)] == 0


NOBODYS_ADMIN = "+sys_admin,+bpf,+perfmon,+dac_read_search"
"""Capabilities of an unprivileged user who may enter namespaces, but not trace
processes."""

HIDING = "mount -t proc -o hidepid=invisible proc /proc"


@pytest.mark.any_kernel
@pytest.mark.parametrize("before", ["true", HIDING])
def test_hidden_namespaces_give_a_warning(before: str) -> None:
    """The warning covers processes of other users, even if /proc hides these processes."""
    admin = (
        *("unshare", "--mount", "sh", "-c", f'{before} && exec "$@"', "sh"),
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *(f"--inh-caps={NOBODYS_ADMIN}", f"--ambient-caps={NOBODYS_ADMIN}"),
        *COMMAND.split(),
    )
    with Exporter("--netns", "all", command=admin) as exporter:
        code, log = exporter.stop()
    assert code == 0
    (warning,) = (line for line in log.splitlines() if "may leave out namespaces" in line)
    assert "CAP_SYS_PTRACE" in warning
