# SPDX-License-Identifier: GPL-3.0-only
"""What is left to the process that serves, from outside and from within."""

import contextlib
import http.client
import json
import os
import resource
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tcpexporter import confinement, features
from tcpexporter.privileges import CAP_BPF
from tests.kernel.attempting import DONE, READING, REFUSED
from tests.kernel.sharing import BOTH_ENDS, EVERY_NAMESPACE, Exporters
from tests.kernel.test_features import found
from tests.kernel.test_process import COMMAND, status, threads
from tests.support import DEADLINE_S, Exporter, Peers, eventually, inside, new_netns

FILTERED = "2"
"""SECCOMP_MODE_FILTER, as proc_pid_status(5) has it."""

SOURCES = ("ebpf", "sock_diag", "procfs")

POLLING = ("--duration", "1", "--source")

ARGUMENTS = (BOTH_ENDS, (*POLLING, "sock_diag"), (*POLLING, "procfs"))

ATTEMPT = "from tests.kernel.attempting import serve; serve()"


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
def test_what_serving_does_not_take_is_refused(source: str) -> None:
    """From within, as somebody would who runs code there; and it goes on serving."""
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
    """The filter's numbers mean other calls there."""
    with Exporter("--source", "sock_diag", command=within()) as exporter:
        with pytest.raises((OSError, http.client.HTTPException)):
            exporter.get("/other-abi")
        exporter.process.wait(DEADLINE_S)
        assert exporter.process.returncode == -signal.SIGSYS


def test_without_landlock_system_calls_are_refused() -> None:
    """As on an old kernel: files can be read that everybody may read."""
    before = "from tcpexporter import confinement; confinement.landlock_abi = lambda: 0"
    with Exporter("--source", "sock_diag", command=within(before)) as exporter:
        assert attempts(exporter) == {
            **dict.fromkeys(REFUSED, "EPERM"),
            **dict.fromkeys(READING, DONE),
        }


WITHOUT_LIBRARY = """
import ctypes.util, sys
ctypes.util.find_library = lambda _name: None
from tcpexporter.__main__ import main
main()
"""


def test_without_libseccomp_it_says_so() -> None:
    """One warning, with what to install; the rest of the confinement is there."""
    command = (sys.executable, "-c", WITHOUT_LIBRARY)
    with Exporter("--source", "sock_diag", command=command) as exporter:
        pid = exporter.process.pid
        assert status(pid, pid)["Seccomp"] == ["0"]
        assert status(pid, pid)["NoNewPrivs"] == ["1"]
        code, complaints = exporter.stop()
    assert code == 0
    (warning,) = (line for line in complaints.splitlines() if "WARNING" in line)
    assert "no system call is refused: install libseccomp" in warning


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


def test_ebpf_takes_two_capabilities_and_gives_them_up() -> None:
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
def test_confined_it_serves(exporters: Exporters, arguments: tuple[str, ...]) -> None:
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
    """A name that is misspelt would be skipped, and the call be refused."""
    pyseccomp = pytest.importorskip("pyseccomp")
    names = {*confinement.ALLOWED, *(name for name, *_ in confinement._conditional(1, 3))}
    numbers = {
        name: pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) for name in names
    }
    assert [name for name, number in numbers.items() if number < 0] == []
