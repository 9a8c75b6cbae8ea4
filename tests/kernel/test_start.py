# SPDX-License-Identifier: GPL-3.0-only
"""The exporter starts with any directory, environment, limits, signals and little memory.

The kind of fault: the loader or the reader process fails because of something inherited,
and the error has another cause.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.helpers.memory_cgroup import memory_cgroup
from tests.support import DEADLINE_S, Exporter, Peers, eventually

EXPORTER = f"{sys.executable} -m tcpexporter"
ONCE = f"{EXPORTER} --once --duration 0 --source ebpf"

AS_NOBODY = (
    "setpriv --reuid=65534 --regid=65534 --clear-groups"
    # CAP_DAC_READ_SEARCH, because the source tree may be readable by root only.
    " --inh-caps=+bpf,+perfmon,+dac_read_search"
    " --ambient-caps=+bpf,+perfmon,+dac_read_search"
)

JUNK = (
    "HOME=/absent TMPDIR=/absent TMP=/absent LC_ALL=xx_YY.none LANG=tr_TR"
    " PATH=/usr/bin:/bin LD_LIBRARY_PATH=/absent LD_BIND_NOW=1 MALLOC_PERTURB_=7"
    " PYTHONUTF8=0 PYTHONIOENCODING=ascii PYTHONOPTIMIZE=2 PYTHONWARNINGS=error"
    " CPATH=/absent ARCH=arm64 BCC_KERNEL_SOURCE=/absent"
    " BCC_KERNEL_MODULES_DIR=/absent BCC_LINUX_VERSION_CODE=1"
    " GIT_DIR=/absent XDG_CACHE_HOME=/absent"
)


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "script",
    [
        f'rmdir "$PWD"; {ONCE}',
        f'chmod 0700 "$PWD"; {AS_NOBODY} {ONCE}',
        f"env {JUNK} {ONCE}",
        f"env -i {ONCE}",
        f"umask 0777; {ONCE}",
        f"exec <&- 2>&-; {ONCE}",
        f"ulimit -Sn 16; {ONCE}",
        f"ulimit -Sv 200000; {ONCE}",
        f"ulimit -c 0 -f 64 -i 0 -l 0 -q 0 -s 128 -t 60 -x 0; {ONCE}",
        f"trap '' CHLD HUP INT PIPE TERM USR1; {ONCE}",
    ],
)
def test_the_program_is_loaded_from_any_environment(script: str, tmp_path: Path) -> None:
    """Directory, variables, umask, descriptors, limits and signals do not matter."""
    directory = tmp_path / "current"
    directory.mkdir()
    ended = run(script, directory)
    assert ended.returncode == 0, ended.stderr
    assert 'tcpexporter_source_info{source="ebpf"} 1.0' in ended.stdout


@pytest.mark.any_kernel
def test_too_few_descriptors_are_refused(tmp_path: Path) -> None:
    """The hard limit is too low for modules and maps; the error names the limit to
    raise."""
    ended = run(f"ulimit -n 16; {ONCE}", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == (
        "tcpexporter: the limit of open files is 16, and at least 64 are required: raise"
        " LimitNOFILE in the unit, or ulimit -n\n"
    )


@pytest.mark.any_kernel
def test_a_blocked_signal_ends_the_exporter() -> None:
    """Some supervisors block SIGTERM in their child processes."""
    block = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'tcpexporter', *sys.argv[1:]])"
    )
    command = (sys.executable, "-c", block)
    with Exporter("--source", "procfs", command=command) as exporter:
        code, _ = exporter.stop()
    assert code == 0


@pytest.mark.any_kernel
def test_relative_paths_are_read_from_a_directory_closed_to_other_users(
    tmp_path: Path,
) -> None:
    """Paths work at the start and at a reload, although the reader process has another
    directory."""
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o700)
    (directory / "web.yml").write_text("basic_auth_users: {}\n")
    (directory / "conf").write_text("duration 3\n")
    script = f'cd {directory} && exec {EXPORTER} --web-config web.yml --conf conf "$@"'
    with Exporter("--source", "procfs", command=("sh", "-c", script, "sh")) as exporter:
        (directory / "conf").write_text("duration 7\n")
        exporter.process.send_signal(signal.SIGHUP)
        eventually(lambda: exporter.value("tcpexporter_duration_seconds") == 7)


@pytest.mark.any_kernel
def test_a_relative_path_in_a_deleted_directory_is_refused(tmp_path: Path) -> None:
    """Exit code 2, and one sentence with the path that would work."""
    directory = tmp_path / "deleted"
    directory.mkdir()
    ended = run(f'rmdir "$PWD"; {EXPORTER} --web-config web.yml', directory)
    assert ended.returncode == 2
    assert "web.yml cannot be found from the current directory" in ended.stderr
    assert "Traceback" not in ended.stderr


@contextlib.contextmanager
def limited(limit_mib: int) -> Iterator[tuple[str, ...]]:
    """Yield a command that runs the exporter with this limit of memory."""
    with memory_cgroup(limit_mib) as processes:
        script = f'echo $$ >{processes}; exec {EXPORTER} "$@"'
        yield ("sh", "-c", script, "sh")


@pytest.mark.any_kernel
def test_too_little_memory_for_the_loader_is_reported() -> None:
    """The exporter polls, and the warning has the cause and the memory needed.

    Either the loader is killed, or the kernel refuses the maps.
    """
    with (
        Peers() as peers,
        limited(54) as command,
        Exporter("--max-connections", "1009", command=command) as exporter,
    ):
        peers.connect(3)
        eventually(lambda: exporter.established(peers.port) == 3)
        assert exporter.value("tcpexporter_source_info", source="sock_diag") == 1
        code, complaints = exporter.stop()
    assert code == 0
    assert "out of memory while compiling; the exporter requires about 76 MiB" in complaints
    assert "Traceback" not in complaints


@pytest.mark.any_kernel
def test_the_memory_that_the_warning_names_is_enough() -> None:
    """With the number from the warning above, the source is ebpf."""
    with (
        limited(76) as command,
        Exporter("--max-connections", "1009", command=command) as exporter,
    ):
        assert exporter.value("tcpexporter_source_info", source="ebpf") == 1
