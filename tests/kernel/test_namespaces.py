# SPDX-License-Identifier: GPL-3.0-only
"""Namespaces end, and other namespaces get their names or inodes.

The kind of fault: the exporter identifies a namespace by a name or inode that another
namespace has by now.
"""

import contextlib
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpexporter.host import namespaces
from tcpexporter.socket_tables import tables as sockets
from tcpexporter.socket_tables.tables import open_tables
from tests.kernel.test_supervisor import Manager
from tests.support import DEADLINE_S, Exporter, Peers, eventually, inside, new_netns

pytestmark = pytest.mark.any_kernel

NAMED = Path("/run/netns")

CONTAINERS = ("a" * 64, "b" * 64)

STAY = "import sys; print(flush=True); sys.stdin.read()"

MOVE = """
import sys
from pyroute2 import netns
print(flush=True)
sys.stdin.readline()
netns.setns(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""
"""A program that enters a namespace when it reads a line."""


def recreate(name: str) -> None:
    """Replace a namespace by another one of the same name."""
    for arguments in (("netns", "del", name), ("netns", "add", name)):
        subprocess.run(["ip", *arguments], check=True)


def refusal(exporter: Exporter, path: str) -> str:
    """Request a page that must fail with status 503; return the error."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        exporter.get(path)
    with raised.value as response:
        assert response.code == 503
        return response.read().decode()


@contextlib.contextmanager
def process(
    *prefix: str, program: str = STAY, argument: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """Start a Python program and wait for its first line.

    ``prefix`` is a command that enters a namespace, ``argument`` is the program's argument.
    At the end of the block the program's standard input is closed, which ends it.
    """
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", program, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin
        assert running.stdout
        running.stdout.readline()
        yield running
        running.stdin.close()


@pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])
def test_a_recreated_namespace_is_not_counted_as_the_old_one(source: str) -> None:
    """While the name is missing the response is 503; when it returns, the exporter ends.

    Only a new process can enter the new namespace: systemd starts one after exit code 1.
    """
    with new_netns() as name:
        with inside(name):
            peers = Peers()
            peers.connect(3)
        arguments = ("--netns", name, "--source", source, "--duration", "0")
        with peers, Exporter(*arguments) as exporter:
            assert exporter.established(peers.port) == 3
            subprocess.run(["ip", "netns", "del", name], check=True)
            (NAMED / name).touch()  # ip-netns(8) does this before it mounts the namespace
            for path in ("/metrics", "/-/ready", "/metrics"):
                assert f"no network namespace /run/netns/{name} any more" in refusal(
                    exporter, path
                )
            assert exporter.get("/-/healthy") == "healthy\n"
            (NAMED / name).unlink()
            subprocess.run(["ip", "netns", "add", name], check=True)
            assert "is another network namespace now" in refusal(exporter, "/metrics")
            _, log = exporter.process.communicate(timeout=DEADLINE_S)
    assert exporter.process.returncode == 1
    # Before Linux 5.19 there is another warning, about CAP_BPF.
    warnings = [line for line in log.splitlines() if "no network namespace" in line]
    assert len(warnings) == 1
    assert "any more: create it again" in warnings[0]
    assert log.splitlines()[-1].startswith(f"tcpexporter: /run/netns/{name} is another")


def test_the_watchdog_does_not_restart_for_a_missing_namespace(tmp_path: Path) -> None:
    """A restart would fail while the namespace is missing, and systemd would soon give
    up."""
    address = tmp_path / "notify"
    with Manager(str(address)) as manager, new_netns() as name:
        tmp_path.chmod(0o755)
        address.chmod(0o777)
        arguments = ("--netns", name, "--source", "sock_diag")
        with manager.start(*arguments, watchdog=True) as exporter:
            manager.wait_for("READY=1")
            subprocess.run(["ip", "netns", "del", name], check=True)
            refusal(exporter, "/-/ready")
            manager.discard_messages()
            for _ in range(3):
                status, fed = manager.wait_for("WATCHDOG=1")
                assert status.startswith(f"STATUS=there is no network namespace {NAMED}")
                assert fed == "WATCHDOG=1"
            subprocess.run(["ip", "netns", "add", name], check=True)
            # The exporter ends without being scraped.
            exporter.process.communicate(timeout=DEADLINE_S)
            assert exporter.process.returncode == 1


def test_a_namespace_whose_name_returns_is_counted_again() -> None:
    """The name means the same namespace when it is mounted again, so the exporter
    continues."""
    with new_netns() as name, process("ip", "netns", "exec", name) as within:
        with Exporter("--netns", name, "--source", "sock_diag") as exporter:
            subprocess.run(["ip", "netns", "del", name], check=True)
            refusal(exporter, "/metrics")
            subprocess.run(["ip", "netns", "attach", name, str(within.pid)], check=True)
            assert exporter.is_ready()
            assert exporter.stop()[0] == 0


def test_a_path_in_proc_is_invalid_after_the_process_has_ended() -> None:
    """The path is in /proc, where a confined process may not follow it."""
    with contextlib.ExitStack() as stack:
        with process("unshare", "--net") as within:
            path = f"/proc/{within.pid}/ns/net"
            arguments = ("--netns", path, "--source", "sock_diag")
            exporter = stack.enter_context(Exporter(*arguments))
            assert exporter.is_ready()
        assert f"no network namespace {path} any more" in refusal(exporter, "/metrics")
        code, log = exporter.stop()
    assert code == 0
    assert log.count("WARNING") == 1


def test_a_path_in_proc_follows_a_process_to_another_namespace() -> None:
    """The exporter detects the change, although it may not inspect the process."""
    with new_netns() as another, process(program=MOVE, argument=another) as mover:
        path = f"/proc/{mover.pid}/ns/net"
        with Exporter("--netns", path, "--source", "sock_diag") as exporter:
            assert exporter.is_ready()
            assert mover.stdin
            assert mover.stdout
            mover.stdin.write("\n")
            mover.stdin.flush()
            mover.stdout.readline()
            assert "is another network namespace now" in refusal(exporter, "/metrics")
            exporter.process.communicate(timeout=DEADLINE_S)
            assert exporter.process.returncode == 1


@pytest.mark.parametrize(
    ("netns", "expected"),
    [
        ("hidden", "cannot check whether /run/netns/hidden still is"),
        ("all", "names of namespaces in /run/netns"),
    ],
)
def test_names_that_only_root_may_read_give_one_warning(netns: str, expected: str) -> None:
    """If only root may search /run/netns, the exporter cannot see names and their
    changes."""
    script = (
        "mount -t tmpfs -o mode=0700 none /run/netns && touch /run/netns/hidden"
        " && mount --bind /proc/self/ns/net /run/netns/hidden"
        f' && exec {sys.executable} -m tcpexporter "$@"'
    )
    command = ("unshare", "--mount", "sh", "-c", script, "sh")
    arguments = ("--netns", netns, "--source", "sock_diag")
    with Exporter(*arguments, command=command) as exporter:
        exporter.samples()
        exporter.samples()
        code, log = exporter.stop()
    assert code == 0
    assert log.count(expected) == 1


def test_once_prints_nothing_after_the_namespace_was_replaced() -> None:
    """The counts would be those of the old namespace."""
    with new_netns() as name:
        command = (sys.executable, "-m", "tcpexporter", "--once", "--netns", name)
        with subprocess.Popen(
            [*command, "--source", "sock_diag", "--duration", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as once:
            # It drops root after it has entered the namespace.
            eventually(
                lambda: (
                    Path(f"/proc/{once.pid}").stat().st_uid != 0 or once.poll() is not None
                )
            )
            recreate(name)
            page, complaint = once.communicate(timeout=DEADLINE_S)
    assert page == ""
    assert once.returncode == 1
    assert "is another network namespace now" in complaint


def test_an_unknown_namespace_is_an_invalid_setting() -> None:
    """One sentence, and exit code 2, after which systemd does not restart the exporter."""
    ended = subprocess.run(
        [sys.executable, "-m", "tcpexporter", "--once", "--netns", "none-such"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (complaint,) = ended.stderr.splitlines()
    assert "no network namespace /run/netns/none-such" in complaint


def test_containers_that_a_pid_namespace_hides_give_a_warning() -> None:
    """In a PID namespace /proc shows no process of the host, and gives no error."""
    command = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m")
    arguments = ("--netns", "all", "--once", "--duration", "0", "--source", "sock_diag")
    ended = subprocess.run(
        [*command, "tcpexporter", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    (warning,) = ended.stderr.splitlines()
    assert "may leave out namespaces" in warning
    assert "PID namespace" in warning


@pytest.fixture
def cgroups() -> Iterator[dict[str, Path]]:
    """Create a cgroup for each container, named by its id."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    root = next(line.split()[4] for line in mounts if " - cgroup2 " in line)
    made = {each: Path(root, each) for each in CONTAINERS}
    for path in made.values():
        path.mkdir()
    yield made
    for path in made.values():
        eventually(lambda: not (path / "cgroup.procs").read_text())  # noqa: B023
        path.rmdir()


@contextlib.contextmanager
def container(cgroup: Path, *prefix: str) -> Iterator[int]:
    """Start a process in a cgroup; yield its process id."""
    with process(*prefix) as running:
        (cgroup / "cgroup.procs").write_text(str(running.pid))
        yield running.pid


def inode_of(process: int) -> int:
    return namespaces.inode(Path(f"/proc/{process}/ns/net"))


def test_a_container_keeps_its_name_while_its_namespace_is_held(
    cgroups: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another namespace can only get its inode after the namespace has been closed."""
    with container(cgroups["a" * 64], "unshare", "--net") as process:
        number = inode_of(process)
        tables = open_tables("sock_diag", "all")
        names = namespaces.Names(lambda: tables.namespaces().tolist())
    with contextlib.closing(tables):
        tables.established()
        assert names.read()[number] == "container:aaaaaaaaaaaa"
        monkeypatch.setattr(sockets, "FORGET_S", 0)
        tables.established()
        assert number not in names.read()


def test_a_namespace_shared_by_two_containers_has_no_name(
    cgroups: dict[str, Path],
) -> None:
    """Otherwise the name would depend on the order in which containers are read."""
    with (
        container(cgroups["a" * 64], "unshare", "--net") as one,
        container(cgroups["b" * 64], "nsenter", f"--net=/proc/{one}/ns/net") as another,
    ):
        number = inode_of(one)
        assert inode_of(another) == number
        names = namespaces.Names(lambda: [number])
        assert names.read()[number] == str(number)


def test_each_namespace_is_read_once_while_processes_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between finding and opening them, one process ends, one enters our namespace, and
    one another namespace."""
    with new_netns() as name:
        path = NAMED / name
        number = namespaces.inode(path)
        found = [
            (number, Path("/proc/0/ns/net")),
            (number, path),
            (number, path),
            (1, path),
            (2, namespaces.OWN),
        ]
        monkeypatch.setattr(namespaces, "others", lambda: iter(found))
        tables = open_tables("sock_diag", "all")
        with contextlib.closing(tables):
            assert tables.namespaces().tolist() == [namespaces.inode(), number]
    assert caplog.text == ""
