# SPDX-License-Identifier: GPL-3.0-only
"""What is broken on purpose, and what is then done: as documented, in one sentence."""

import contextlib
import ctypes
import http.client
import os
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
    """A command that runs the exporter where something is mounted or not, for it alone."""
    script = f'set -e; {preparation}; exec {COMMAND} "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


WITHOUT_BTF = in_own_mounts("mount --bind /dev/null /sys/kernel/btf/vmlinux")
WITHOUT_TRACEFS = in_own_mounts(
    "mount -t tmpfs none /sys/kernel/tracing; mount -t tmpfs none /sys/kernel/debug"
)
WITHOUT_PROC = in_own_mounts("mount -t tmpfs none /proc")


def refused(command: tuple[str, ...], *arguments: str) -> str:
    """What it says when it cannot start: its last line."""
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
def test_without_btf_it_says_what_still_works() -> None:
    """The program cannot be loaded without the kernel's types; polling is offered."""
    sentence = refused(WITHOUT_BTF, "--source", "ebpf")
    assert "no BTF" in sentence
    assert "--source sock_diag" in sentence


def test_without_btf_auto_polls() -> None:
    """``--source auto`` falls back, and says the same."""
    with Exporter(command=WITHOUT_BTF) as exporter, Peers() as peers:
        peers.connect(3)
        eventually(lambda: exporter.established(peers.port) == 3)
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        _, complaints = exporter.stop()
    assert "no BTF" in complaints


def test_tracefs_is_not_needed() -> None:
    """A minimal host has neither tracefs nor debugfs mounted."""
    arguments = ("--source", "ebpf")
    with Exporter(*arguments, command=WITHOUT_TRACEFS) as exporter, Peers() as peers:
        peers.connect(3)
        assert exporter.established(peers.port) == 3


@pytest.mark.any_kernel
def test_without_proc_it_says_so() -> None:
    """A /proc that cannot be read ends it with one sentence."""
    assert "/proc/" in refused(WITHOUT_PROC, "--source", "procfs")


def deny_netlink() -> None:
    """Have the kernel refuse netlink sockets to this process, by seccomp(2)."""
    load, jump, returning = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allowed, denied = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, ERRNO | EPERM
    socket_number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    program = (
        (load, 0, 0, 0),  # the number of the system call
        (jump, 0, 3, socket_number),
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
def test_without_sock_diag_proc_is_read() -> None:
    """Where netlink is refused, connections from before come from /proc/net/tcp."""
    with Peers() as peers:
        peers.connect(7)
        with Exporter("--source", "ebpf", command=WITHOUT_NETLINK) as exporter:
            peers.connect(4)
            assert exporter.established(peers.port) == 11
            _, complaints = exporter.stop()
    assert "reading /proc/net/tcp instead of sock_diag" in complaints


@pytest.mark.any_kernel
def test_a_named_sock_diag_does_not_fall_back() -> None:
    """``--source sock_diag`` where netlink is refused: exit code 1."""
    assert "sock_diag" in refused(WITHOUT_NETLINK, "--source", "sock_diag")


@pytest.mark.any_kernel
@pytest.mark.parametrize("part", [0, 0.2, 0.4, 0.6, 0.8])
def test_a_loader_killed_at_any_step_leaves_nothing_half_done(
    load_s: float, part: float
) -> None:
    """Its parent is told that it died, in one sentence, or has all it needs."""
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
    """With one sentence, and exit code 1."""
    with Exporter("--source", "ebpf", wait=False) as exporter:
        kill_loader(exporter.process.pid, after_s=0)
        _, complaints = exporter.process.communicate(timeout=DEADLINE_S)
        assert exporter.process.returncode == 1
        assert "Traceback" not in complaints
        assert "died" in complaints


def test_in_a_time_namespace_ages_are_right() -> None:
    """A container's CLOCK_BOOTTIME may be days ahead; the kernel's timestamps are not."""
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
def test_without_more_descriptors_new_clients_wait() -> None:
    """Who is connected goes on; one warning; when there are some again all is as before."""
    with Exporter("--source", "ebpf") as exporter, Peers() as peers:
        kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=DEADLINE_S)
        ask_on(kept)
        limit(exporter, f"--nofile={descriptors(exporter)}:")
        answers: list[str] = []
        late = threading.Thread(target=lambda: answers.append(exporter.get("/metrics")))
        late.start()
        began_s = cpu_s(exporter)
        for number in range(1, 4):
            time.sleep(0.7)  # asyncio tries once a second
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
def test_without_more_descriptors_polling_goes_on(source: str) -> None:
    """A fault that ended the polling thread: it listed a directory after each poll."""
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
    """What it has used of a CPU: proc_pid_stat(5)."""
    shown = Path(f"/proc/{exporter.process.pid}/stat").read_text().rpartition(")")[2]
    return sum(map(int, shown.split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_without_more_memory_there_are_no_metrics(source: str) -> None:
    """503 with a sentence, and everything goes on when there is memory: threads, too."""
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
            time.sleep(0.4)  # for the threads to be refused some, too
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
def test_without_more_threads_the_numbers_go_on(source: str) -> None:
    """A fault that ended the polling thread: a dump of many sockets began a thread."""
    arguments = ("--source", source, "--interval", "0.1", "--reconcile-interval", "1")
    with pids_cgroup() as pids, Peers() as peers:
        peers.connect(3001)
        with Exporter(*arguments, command=pids.within((*COMMAND.split(),))) as exporter:
            eventually(lambda: exporter.established(peers.port) == 3001)
            pids.allow("1")
            peers.connect(7)
            eventually(lambda: exporter.established(peers.port) == 3008)
            if source == "ebpf":
                compared(exporter)
            for pair in peers.pairs[:2003]:
                for each in pair:
                    each.close()
            eventually(lambda: exporter.established(peers.port) == 1005)
            if source == "ebpf":
                compared(exporter)
            for task in ("reconcile" if source == "ebpf" else "poll", "reload"):
                assert exporter.value(FAILURES, task=task) == 0
            code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


FAILURES = "tcpexporter_background_failures_total"


def compared(exporter: Exporter) -> None:
    """Wait for a comparison that begins from now on."""
    runs = exporter.value("tcpexporter_reconciliations_total") or 0
    eventually(
        lambda: (exporter.value("tcpexporter_reconciliations_total") or 0) >= runs + 2
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
@pytest.mark.parametrize("most", ["1", "2", "3"])
def test_with_too_few_threads_it_does_not_start(source: str, most: str) -> None:
    """Neither a traceback nor 503 for ever: what to raise, in one sentence."""
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
    ("fault", "limit", "told"),
    [
        ("1 / 0", "", "ZeroDivisionError: division by zero"),
        (
            "threading.Event().wait()",
            "polling.LIMIT_S = polling.STOP_TIMEOUT_S = 0.2",
            "the thread poll hangs",
        ),
    ],
)
def test_a_poll_that_fails_or_hangs_is_503(fault: str, limit: str, told: str) -> None:
    """A fault that nobody expects: no numbers, two lines of the log, and a clean end."""
    command = (sys.executable, "-c", POLL_FAILS.format(fault=fault, limit=limit))
    arguments = ("--source", "sock_diag", "--interval", "0.1")
    with Exporter(*arguments, command=command) as exporter:
        eventually(lambda: told in answered(exporter))
        for _ in range(3):
            assert answered(exporter).startswith(f"503 {told}")
        code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log
    assert log.count("cannot count connections: ") == 1
    assert log.count("cannot collect metrics: ") == 1


def answered(exporter: Exporter) -> str:
    """What is said instead of metrics; nothing if there are some."""
    try:
        exporter.get("/metrics")
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    return ""


WITH_TRACEFS = in_own_mounts(
    "mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing"
)


def within_mounts(exporter: Exporter, *command: str) -> None:
    """Run something where the exporter has its files."""
    target = f"--target={exporter.process.pid}"
    subprocess.run(["nsenter", target, "--mount", *command], check=True)


def test_tracefs_may_be_unmounted_later() -> None:
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
def test_nothing_need_be_writable(tmp_path: Path) -> None:
    """Every file system is read-only, /tmp and /run, too."""
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
def test_a_log_that_cannot_be_written_is_no_trouble(output: str) -> None:
    """A full disk, or no standard error at all: everything else is as always."""
    arguments = ("--source", "ebpf", "--log-level", "debug")
    with Exporter(*arguments, command=logging_to(output)) as exporter, Peers() as peers:
        peers.connect(3)
        for _ in range(3):
            exporter.process.send_signal(signal.SIGHUP)  # which it says something of
            assert exporter.established(peers.port) == 3
        assert exporter.stop()[0] == 0


@pytest.mark.any_kernel
@pytest.mark.parametrize("output", ["2>/dev/full", "2>&-"])
def test_what_ends_it_need_not_be_said(output: str) -> None:
    """The exit code tells of a wrong setting all the same."""
    command = [*logging_to(output), "--port", "x"]
    ended = subprocess.run(command, check=False, timeout=DEADLINE_S)
    assert ended.returncode == 2


@pytest.mark.any_kernel
def test_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """Nothing but log lines is in it, from before the disk was full and after."""
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
        eventually(lambda: has_said(exporter, seen, "SIGHUP has no effect"))
        for line in Path(seen).read_text().splitlines():
            assert " INFO " in line, line


@pytest.mark.any_kernel
@pytest.mark.parametrize("source", ["ebpf", "sock_diag"])
def test_a_log_that_nobody_reads_does_not_block_it(source: str, tmp_path: Path) -> None:
    """A pipe that is full from before the start on: lines are dropped and counted.

    When somebody reads it again, lines are written again.
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
            exporter.process.send_signal(signal.SIGHUP)  # which it says something of
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


def has_said(exporter: Exporter, log: str, words: str) -> bool:
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
def test_the_address_it_listens_on_may_go_and_come() -> None:
    """It stays, without a word, and can be reached when the address is back."""
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
def test_others_at_the_same_tracepoint_take_nothing_away() -> None:
    """Attached before ours and after, and detached while ours runs: all see every event."""
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
def test_stopped_for_a_while_it_has_missed_nothing() -> None:
    """SIGSTOP, some seconds in which connections come and go, SIGCONT: ages are right."""
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
"""What an unprivileged user has who may enter namespaces, but not trace processes."""

HIDING = "mount -t proc -o hidepid=invisible proc /proc"


@pytest.mark.any_kernel
@pytest.mark.parametrize("before", ["true", HIDING])
def test_namespaces_that_may_not_be_seen_are_warned_of(before: str) -> None:
    """Those of other users' processes, when these are hidden, too."""
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
