# SPDX-License-Identifier: GPL-3.0-only
"""What is left to the process that serves, from outside and from within."""

import contextlib
import ctypes
import errno
import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tcpexporter.ebpf import features
from tcpexporter.host import seccomp
from tcpexporter.host.privileges import CAP_BPF
from tests.kernel.helpers.forbidden_operations import DONE, READING, REFUSED
from tests.kernel.helpers.shared import BOTH_ENDS, EVERY_NAMESPACE, Exporters
from tests.kernel.test_features import found
from tests.kernel.test_process import COMMAND, status, threads
from tests.support import DEADLINE_S, Exporter, Peers, eventually, inside, new_netns

FILTERED = "2"
"""SECCOMP_MODE_FILTER, as proc_pid_status(5) has it."""

SOURCES = ("ebpf", "sock_diag", "procfs")

POLLING = ("--duration", "1", "--source")

ARGUMENTS = (BOTH_ENDS, (*POLLING, "sock_diag"), (*POLLING, "procfs"))

ATTEMPT = "from tests.kernel.helpers.forbidden_operations import serve; serve()"


def within(before: str = "") -> tuple[str, ...]:
    """A command that runs the exporter with pages that attempt what is refused."""
    return (sys.executable, "-c", f"{before}\n{ATTEMPT}")


def attempts(exporter: Exporter) -> dict[str, str]:
    outcomes: dict[str, str] = json.loads(exporter.get("/attempts"))
    return outcomes


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_thread_is_confined(exporters: Exporters, arguments: tuple[str, ...]) -> None:
    """There is a filter of system calls on each, and no way out."""
    pid = exporters(*arguments).process.pid
    assert len(threads(pid)) > 1
    for thread in threads(pid):
        shown = status(pid, thread)
        assert shown["Seccomp"] == [FILTERED]
        assert shown["NoNewPrivs"] == ["1"]


@pytest.mark.parametrize("source", SOURCES)
def test_operations_that_serving_does_not_need_are_refused(source: str) -> None:
    """Code in the process attempts them, as an attacker would; serving continues."""
    reading = "EACCES" if found(features.LANDLOCK) else DONE
    with Exporter("--source", source, command=within()) as exporter, Peers() as peers:
        outcomes = attempts(exporter)
        assert outcomes == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys(READING, reading),
        }
        peers.connect(7)
        eventually(lambda: exporter.established(peers.port) == 7)
        code, complaints = exporter.stop()
    assert code == 0
    assert "Traceback" not in complaints


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is of x86")
def test_system_calls_of_another_abi_end_it() -> None:
    """With another ABI the numbers of the filter mean other system calls."""
    with Exporter("--source", "sock_diag", command=within()) as exporter:
        with pytest.raises((OSError, http.client.HTTPException)):
            exporter.get("/other-abi")
        exporter.process.wait(DEADLINE_S)
        assert exporter.process.returncode == -signal.SIGSYS


def test_without_landlock_system_calls_are_refused() -> None:
    """As on an old kernel: only world-readable files can be read."""
    before = "from tcpexporter.host import landlock; landlock.abi_version = lambda: 0"
    with Exporter("--source", "sock_diag", command=within(before)) as exporter:
        assert attempts(exporter) == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys(READING, DONE),
        }


def confined(exporter: Exporter) -> dict[str, float]:
    """What the page says is in force."""
    return {
        dict(labels)["by"]: value
        for (name, labels), value in exporter.samples().items()
        if name == "tcpexporter_confined"
    }


def in_force(**other: float) -> dict[str, float]:
    """What is in force on this kernel, but for these."""
    return {
        "seccomp": 1,
        "landlock": float(bool(found(features.LANDLOCK))),
        "unprivileged_user": 1,
        "no_capabilities": 1,
        **other,
    }


def test_the_metrics_report_the_limits_in_force(exporters: Exporters) -> None:
    """They agree with /proc."""
    kept = 0 if found(features.UNPRIVILEGED_MAPS) else 1
    exporter = exporters(*BOTH_ENDS)
    assert confined(exporter) == in_force(no_capabilities=1 - kept)
    assert confined(exporters(*POLLING, "sock_diag")) == in_force()


HIDING = """
set -e
mount --bind /dev/null "$(readlink -f {file})"
shift
exec "$@"
"""
"""What follows does not find a file; a mount of its own is what hides it."""


def hiding(file: str, *command: str) -> tuple[str, ...]:
    script = HIDING.format(file=file)
    return ("unshare", "--mount", "sh", "-c", script, "sh", "--", *command)


def library() -> str:
    """The path of libseccomp."""
    ctypes.CDLL(seccomp.LIBSECCOMP)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if seccomp.LIBSECCOMP in line)


WITHOUT_PACKAGE = """
import sys
sys.modules["pyseccomp"] = None
from tcpexporter.__main__ import main
main()
"""

UNKNOWN_MACHINE = """
import platform
platform.machine = lambda: "riscv64"
from tcpexporter.__main__ import main
main()
"""


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda: hiding(library(), *COMMAND), "install the distribution's libseccomp2"),
        (
            lambda: (sys.executable, "-c", WITHOUT_PACKAGE),
            "install the Python package pyseccomp",
        ),
        (
            lambda: (sys.executable, "-c", UNKNOWN_MACHINE),
            "there is no list of system calls for riscv64",
        ),
    ],
)
def test_without_a_filter_the_warning_names_the_missing_package(
    command: Callable[[], tuple[str, ...]], words: str
) -> None:
    """One warning with the remedy, and the metric; the rest of the confinement is there.

    The kind of fault: a message that names another thing than the one that is missing.
    """
    with Exporter("--source", "sock_diag", command=command()) as exporter:
        pid = exporter.process.pid
        assert status(pid, pid)["Seccomp"] == ["0"]
        assert status(pid, pid)["NoNewPrivs"] == ["1"]
        assert confined(exporter) == in_force(seccomp=0)
        code, complaints = exporter.stop()
    assert code == 0
    (warning,) = (line for line in complaints.splitlines() if "WARNING" in line)
    assert f"seccomp disabled: {words}" in warning


@pytest.mark.any_kernel
def test_libseccomp_is_found_without_ldconfig() -> None:
    """Neither that nor a compiler is in a minimal system, where libseccomp may be."""
    command = hiding("/sbin/ldconfig", "env", "PATH=/nonexistent", *COMMAND)
    with Exporter("--source", "sock_diag", command=command) as exporter:
        assert confined(exporter)["seccomp"] == 1
        _, complaints = exporter.stop()
    assert "WARNING" not in complaints


REFUSING = """
import pyseccomp
made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
made.set_attr(pyseccomp.Attr.CTL_NNP, 0)
for name, *conditions in {calls}:
    arguments = [pyseccomp.Arg(number, pyseccomp.EQ, value) for number, value in conditions]
    made.add_rule(pyseccomp.ERRNO({answer}), name, *arguments)
made.load()
from tcpexporter.__main__ import main
main()
"""
"""Starts in a seccomp filter, as in a container."""

LANDLOCK_CALLS = [("landlock_create_ruleset",)]
SECCOMP_CALLS = [("prctl", (0, seccomp.PR_SET_SECCOMP))]


def within_filter(
    calls: Sequence[tuple[str, *tuple[tuple[int, int], ...]]], answer: int = errno.EPERM
) -> tuple[str, ...]:
    """A command that runs the exporter where these calls are refused."""
    return (sys.executable, "-c", REFUSING.format(calls=calls, answer=answer))


@pytest.mark.any_kernel
def test_a_limit_that_the_container_refuses_is_reported_as_0() -> None:
    """A filter from before the start is not reported as ours, although Seccomp is 2."""
    command = within_filter([*SECCOMP_CALLS, *LANDLOCK_CALLS])
    with Exporter("--source", "sock_diag", command=command) as exporter:
        pid = exporter.process.pid
        assert status(pid, pid)["Seccomp"] == [FILTERED]
        assert confined(exporter) == in_force(seccomp=0, landlock=0)
        code, complaints = exporter.stop()
    assert code == 0
    (warning,) = (line for line in complaints.splitlines() if "WARNING" in line)
    assert "seccomp disabled: this kernel or container does not support" in warning


def once(*command: str) -> "subprocess.CompletedProcess[str]":
    """What comes of ``--once --duration 0``."""
    ended = subprocess.run(
        [*command, "--once", "--duration", "0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.any_kernel
def test_root_without_landlock_and_seccomp_is_refused() -> None:
    """Root that cannot become another user, and that neither seccomp nor Landlock keeps
    from root's files, could get every privilege back: exit code 1 and one sentence.
    """
    command = within_filter([*SECCOMP_CALLS, *LANDLOCK_CALLS, ("setresuid",)])
    ended = once(*command, "--source", "sock_diag")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("tcpexporter: still root, which can")
    assert "add CAP_SETUID" in ended.stderr


@pytest.mark.parametrize(
    ("held", "source"), [("-all,+bpf,+perfmon", "ebpf"), ("-all", "sock_diag")]
)
def test_a_container_without_capabilities_for_ids_has_a_page(
    held: str, source: str
) -> None:
    """As with Kubernetes' ``drop: [ALL], add: [BPF, PERFMON]``, and with none at all."""
    # Before Linux 5.11 the maps count as locked memory, and no capability raises its limit.
    start = f'ulimit -l unlimited; exec setpriv --bounding-set={held} "$@"'
    ended = once("sh", "-c", start, "sh", *COMMAND)
    assert ended.returncode == 0, ended.stderr
    assert f'tcpexporter_source_info{{source="{source}"}} 1.0' in ended.stdout
    assert 'tcpexporter_confined{by="unprivileged_user"} 0.0' in ended.stdout
    assert 'tcpexporter_confined{by="seccomp"} 1.0' in ended.stdout
    (warning,) = (line for line in ended.stderr.splitlines() if "user 0" in line)
    assert "start the exporter with CAP_SETGID, CAP_SETUID" in warning
    if found(features.UNPRIVILEGED_MAPS):
        assert "keeping CAP_BPF" not in ended.stderr


@pytest.mark.any_kernel
def test_root_of_a_user_namespace_has_a_page() -> None:
    """Where no other user has an id: it may change ids, and the kernel knows no other."""
    ended = once("unshare", "--user", "--map-root-user", *COMMAND)
    assert ended.returncode == 0, ended.stderr
    assert "user 0 (refused despite CAP_SETUID" in ended.stderr


@pytest.mark.any_kernel
def test_bpf_refused_by_a_seccomp_filter_is_reported_as_such() -> None:
    """Whatever the filter answers: that the kernel had no bpf(2) would be no remedy."""
    for answer in (errno.EPERM, errno.ENOSYS):
        ended = once(*within_filter([("bpf",)], answer), "--source", "ebpf")
        assert ended.returncode == 1
        assert (
            "refuses bpf(2) although we have the capabilities: allow it in the seccomp"
            in (ended.stderr)
        )


@pytest.mark.any_kernel
def test_files_are_read_again_without_capabilities(tmp_path: Path) -> None:
    """The child that reads them stays root as well, and reads root's files."""
    conf = tmp_path / "tcpexporter.conf"
    conf.write_text("duration 7\n")
    conf.chmod(0o600)
    command = ("setpriv", "--bounding-set=-all", *COMMAND, "--conf", str(conf))
    with Exporter("--source", "sock_diag", command=command) as exporter:
        assert exporter.value("tcpexporter_duration_seconds") == 7
        conf.write_text("duration 11\n")
        exporter.process.send_signal(signal.SIGHUP)
        eventually(lambda: exporter.value("tcpexporter_duration_seconds") == 11)
        code, complaints = exporter.stop()
    assert code == 0
    assert "Traceback" not in complaints


NOBODY_WITH = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
# The tree may lie where only root can read.
LOADER_CAPABILITIES = "+bpf,+perfmon,+dac_read_search"
AS_NOBODY = (
    *NOBODY_WITH,
    f"--bounding-set=-all,{LOADER_CAPABILITIES}",
    f"--inh-caps=-all,{LOADER_CAPABILITIES}",
    f"--ambient-caps=-all,{LOADER_CAPABILITIES}",
    *COMMAND,
)


def test_ebpf_requires_two_capabilities_and_drops_them() -> None:
    """As systemd starts it: an unprivileged user, with CAP_BPF and CAP_PERFMON ambient."""
    kept = 0 if found(features.UNPRIVILEGED_MAPS) else 1 << CAP_BPF
    # Before Linux 5.11 maps count as locked memory: the unit has LimitMEMLOCK. Where this
    # takes more than root has, it is not such a kernel.
    with contextlib.suppress(ValueError):
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    with Exporter("--source", "ebpf", command=AS_NOBODY) as exporter, Peers() as peers:
        peers.connect(7)
        assert exporter.established(peers.port) == 7
        pid = exporter.process.pid
        for thread in threads(pid):
            shown = status(pid, thread)
            for held in ("CapPrm", "CapEff"):
                assert int(shown[held][0], 16) == kept
            for held in ("CapInh", "CapAmb"):
                assert int(shown[held][0], 16) == 0
            assert shown["NoNewPrivs"] == ["1"]
            assert shown["Seccomp"] == [FILTERED]
        code, _ = exporter.stop()
    assert code == 0


def answer(exporter: Exporter, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{exporter.port}{path}", method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_page_is_served_while_confined(
    exporters: Exporters, arguments: tuple[str, ...]
) -> None:
    """Every kind of page, what is in /proc of itself, and what listens only now."""
    exporter = exporters(*arguments)
    assert answer(exporter, "/")[0] == 200
    assert answer(exporter, "/nothing")[0] == 404
    assert answer(exporter, "/metrics", "POST")[0] == 405
    for name in ("process_open_fds", "process_max_fds", "process_cpu_seconds_total"):
        assert exporter.value(name) is not None
    started_s = exporter.value("process_start_time_seconds")
    assert started_s is not None
    assert started_s > 0
    with Peers() as peers:
        eventually(lambda: exporter.established(peers.port) == 0)


def test_its_own_files_stay_readable(exporters: Exporters) -> None:
    """Also when the kernel has forgotten all that it need not remember of /proc."""
    exporter = exporters(*POLLING, "sock_diag")
    for _ in range(2):
        Path("/proc/sys/vm/drop_caches").write_text("2")  # proc(5)
    assert exporter.value("process_open_fds") is not None


def test_a_namespace_is_named_while_confined(exporters: Exporters) -> None:
    """Names are looked up at each scrape: one that is given after the start is shown."""
    exporter = exporters(*EVERY_NAMESPACE)
    with new_netns() as name:
        with inside(name):
            peers = Peers()
            peers.connect(3)
        with peers:
            eventually(lambda: exporter.established(peers.port, netns=name) == 3)


def test_what_is_allowed_is_known_to_libseccomp() -> None:
    """A misspelt name would be skipped, and its system call refused."""
    pyseccomp = pytest.importorskip("pyseccomp")
    names = {*seccomp.ALLOWED, *(name for name, *_ in seccomp._conditional(1, 3))}
    numbers = {
        name: pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) for name in names
    }
    assert [name for name, number in numbers.items() if number < 0] == []
