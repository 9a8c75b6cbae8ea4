# SPDX-License-Identifier: GPL-3.0-only
"""Which operations the serving process may execute, seen from outside and from within."""

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
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tcpexporter.ebpf import features
from tcpexporter.host import seccomp
from tcpexporter.host.privileges import CAP_BPF
from tests.kernel.helpers.cgroups import mount_point
from tests.kernel.helpers.forbidden_operations import (
    DONE,
    LISTING,
    READING,
    REFUSED,
)
from tests.kernel.helpers.shared import BOTH_ENDS, EVERY_NAMESPACE, Exporters
from tests.kernel.test_features import found
from tests.kernel.test_process import COMMAND, status, statuses, threads
from tests.support import DEADLINE_S, Exporter, Peers, eventually, inside, new_netns

FILTERED = "2"
"""The value SECCOMP_MODE_FILTER of the field Seccomp in proc_pid_status(5)."""

SOURCES = ("ebpf", "sock_diag", "procfs")

POLLING = ("--duration", "1", "--source")

ARGUMENTS = (BOTH_ENDS, (*POLLING, "sock_diag"), (*POLLING, "procfs"))

ATTEMPT = "from tests.kernel.helpers.forbidden_operations import serve; serve()"


def within(before: str = "") -> tuple[str, ...]:
    """Return a command that runs the exporter with pages that attempt forbidden
    operations."""
    return (sys.executable, "-c", f"{before}\n{ATTEMPT}")


def attempts(exporter: Exporter) -> dict[str, str]:
    outcomes: dict[str, str] = json.loads(exporter.get("/attempts"))
    return outcomes


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_thread_is_confined(exporters: Exporters, arguments: tuple[str, ...]) -> None:
    """A seccomp filter and no_new_privs apply to each thread."""
    pid = exporters(*arguments).process.pid
    assert len(threads(pid)) > 1
    for shown in statuses(pid):
        assert shown["Seccomp"] == [FILTERED]
        assert shown["NoNewPrivs"] == ["1"]


@pytest.mark.parametrize("source", SOURCES)
def test_operations_that_serving_does_not_need_are_refused(source: str) -> None:
    """Code in the process attempts them, as an attacker would, and serving continues."""
    reading = "EACCES" if found(features.LANDLOCK) else DONE
    with Exporter("--source", source, command=within()) as exporter, Peers() as peers:
        outcomes = attempts(exporter)
        assert outcomes == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys([*READING, *LISTING], reading),
        }
        peers.connect(7)
        eventually(lambda: exporter.established(peers.port) == 7)
        code, complaints = exporter.stop()
    assert code == 0
    assert "Traceback" not in complaints


def test_with_owners_the_process_lists_cgroups_but_reads_no_file_there() -> None:
    """All other operations stay refused."""
    mount_point()  # skips the test if there is no such file system
    reading = "EACCES" if found(features.LANDLOCK) else DONE
    labels = ("--labels", "port,unit")
    with Exporter("--source", "sock_diag", *labels, command=within()) as exporter:
        assert attempts(exporter) == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys(READING, reading),
            **dict.fromkeys(LISTING, DONE),
        }


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86 has the x32 ABI")
def test_a_system_call_of_another_abi_ends_the_process() -> None:
    """With another ABI the filter's numbers would mean other system calls."""
    with Exporter("--source", "sock_diag", command=within()) as exporter:
        with pytest.raises((OSError, http.client.HTTPException)):
            exporter.get("/other-abi")
        exporter.process.wait(DEADLINE_S)
        assert exporter.process.returncode == -signal.SIGSYS


def test_without_landlock_system_calls_are_refused() -> None:
    """Only one operation is allowed: reading files that are readable for every user."""
    before = "from tcpexporter.host import landlock; landlock.abi_version = lambda: 0"
    with Exporter("--source", "sock_diag", command=within(before)) as exporter:
        assert attempts(exporter) == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys([*READING, *LISTING], DONE),
        }


def confined(exporter: Exporter) -> dict[str, float]:
    """Return the values of tcpexporter_confined."""
    return {
        dict(labels)["by"]: value
        for (name, labels), value in exporter.samples().items()
        if name == "tcpexporter_confined"
    }


def in_force(**other: float) -> dict[str, float]:
    """Return the expected values on this kernel, except for those given."""
    return {
        "seccomp": 1,
        "landlock": float(bool(found(features.LANDLOCK))),
        "unprivileged_user": 1,
        "no_capabilities": 1,
        **other,
    }


def test_the_metrics_report_the_limits_in_force(exporters: Exporters) -> None:
    """The values of tcpexporter_confined agree with /proc."""
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
"""A shell script that hides a file in its own mount namespace, then runs a command."""


def hiding(file: str, *command: str) -> tuple[str, ...]:
    script = HIDING.format(file=file)
    return ("unshare", "--mount", "sh", "-c", script, "sh", "--", *command)


def library() -> str:
    """Return the path of libseccomp."""
    ctypes.CDLL(seccomp.LIBSECCOMP)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if seccomp.LIBSECCOMP in line)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({modules}))
from tcpexporter.__main__ import main
main()
"""


def without(*modules: str) -> tuple[str, ...]:
    """Return a command that runs the exporter where these modules cannot be imported."""
    return (sys.executable, "-c", WITHOUT.format(modules=modules))


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
            lambda: without("pyseccomp", "seccomp"),
            "install the Python package pyseccomp, or the distribution's",
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
    """There is one warning with the remedy, and the metric is 0; all other limits are in
    force.

    The kind of fault: the warning names something that is not missing.
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
def test_the_module_of_the_distribution_makes_the_same_filter() -> None:
    """python3-seccomp replaces pyseccomp: all tests of the filter hold for it too."""
    modules = [pytest.importorskip(name) for name in ("pyseccomp", "seccomp")]
    for connected in (None, 3):
        one, other = (exported(each, connected) for each in modules)
        assert one == other
    command = without("pyseccomp")
    with Exporter("--source", "sock_diag", command=command) as exporter:
        assert confined(exporter)["seccomp"] == 1
        _, complaints = exporter.stop()
    assert "WARNING" not in complaints


def exported(module: ModuleType, connected: int | None) -> bytes:
    with tempfile.TemporaryFile() as file:
        seccomp._system_calls(module, 7, connected).export_bpf(file)
        file.seek(0)
        return file.read()


@pytest.mark.any_kernel
def test_libseccomp_is_found_without_ldconfig() -> None:
    """Minimal systems have libseccomp, but neither ldconfig nor a compiler."""
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
"""A Python script that starts the exporter in a seccomp filter, as a container does."""

LANDLOCK_CALLS = [("landlock_create_ruleset",)]
SECCOMP_CALLS = [("prctl", (0, seccomp.PR_SET_SECCOMP))]


def within_filter(
    calls: Sequence[tuple[str, *tuple[tuple[int, int], ...]]], answer: int = errno.EPERM
) -> tuple[str, ...]:
    """Return a command that runs the exporter where these system calls are refused."""
    return (sys.executable, "-c", REFUSING.format(calls=calls, answer=answer))


@pytest.mark.any_kernel
def test_a_limit_that_the_container_refuses_is_reported_as_0() -> None:
    """A filter that existed before the start is not reported as ours, although Seccomp
    is 2."""
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
    """Run the exporter with ``--once --duration 0``, and return its exit code and
    output."""
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
    """Such a root could regain every privilege: exit code 1 and one sentence.

    It cannot switch to another user, and neither seccomp nor Landlock protects root's
    files.
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
def test_a_container_without_capabilities_to_change_ids_is_served(
    held: str, source: str
) -> None:
    """One case is Kubernetes' ``drop: [ALL], add: [BPF, PERFMON]``, the other no
    capability."""
    # Before Linux 5.11 maps count as locked memory, and no capability here raises its
    # limit.
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
def test_root_of_a_user_namespace_is_served() -> None:
    """It may change ids, but no other user has an id in this namespace."""
    ended = once("unshare", "--user", "--map-root-user", *COMMAND)
    assert ended.returncode == 0, ended.stderr
    assert "user 0 (refused despite CAP_SETUID" in ended.stderr


@pytest.mark.any_kernel
def test_bpf_refused_by_a_seccomp_filter_is_reported_as_such() -> None:
    """This holds for each error number of the filter. For some of them "this kernel has
    no bpf(2)" would be a wrong conclusion."""
    for answer in (errno.EPERM, errno.ENOSYS):
        ended = once(*within_filter([("bpf",)], answer), "--source", "ebpf")
        assert ended.returncode == 1
        assert (
            "refuses bpf(2) although this process has the capabilities: allow it in the"
            " seccomp" in ended.stderr
        )


@pytest.mark.any_kernel
def test_a_reload_requires_no_capability(tmp_path: Path) -> None:
    """The reader process also stays root, and can read root's files."""
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
# The source tree may be readable by root only.
LOADER_CAPABILITIES = "+bpf,+perfmon,+dac_read_search"
AS_NOBODY = (
    *NOBODY_WITH,
    f"--bounding-set=-all,{LOADER_CAPABILITIES}",
    f"--inh-caps=-all,{LOADER_CAPABILITIES}",
    f"--ambient-caps=-all,{LOADER_CAPABILITIES}",
    *COMMAND,
)


def test_ebpf_requires_two_capabilities_and_drops_them() -> None:
    """The unit of systemd starts an unprivileged user with ambient CAP_BPF and
    CAP_PERFMON."""
    kept = 0 if found(features.UNPRIVILEGED_MAPS) else 1 << CAP_BPF
    # Before Linux 5.11 maps count as locked memory, so the unit sets LimitMEMLOCK. Raising
    # the limit fails in some containers, in which no test runs on such an old kernel.
    with contextlib.suppress(ValueError):
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (unlimited, unlimited))
    with Exporter("--source", "ebpf", command=AS_NOBODY) as exporter, Peers() as peers:
        peers.connect(7)
        assert exporter.established(peers.port) == 7
        for shown in statuses(exporter.process.pid):
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
    """This includes pages that read /proc/self, and a listener that opens after the
    start."""
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


def test_the_installed_files_stay_readable(exporters: Exporters) -> None:
    """They stay readable after the kernel has dropped cached entries of /proc."""
    exporter = exporters(*POLLING, "sock_diag")
    for _ in range(2):
        Path("/proc/sys/vm/drop_caches").write_text("2")  # proc(5)
    assert exporter.value("process_open_fds") is not None


def test_a_namespace_is_named_while_confined(exporters: Exporters) -> None:
    """Each scrape looks up names, so a name given after the start is shown."""
    exporter = exporters(*EVERY_NAMESPACE)
    with new_netns() as name:
        with inside(name):
            peers = Peers()
            peers.connect(3)
        with peers:
            eventually(lambda: exporter.established(peers.port, netns=name) == 3)


def test_libseccomp_knows_every_allowed_system_call() -> None:
    """A misspelt name would be skipped, and its system call refused."""
    pyseccomp = pytest.importorskip("pyseccomp")
    names = {*seccomp.ALLOWED, *(name for name, *_ in seccomp._conditional(1, 3))}
    numbers = {
        name: pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) for name in names
    }
    assert [name for name, number in numbers.items() if number < 0] == []
