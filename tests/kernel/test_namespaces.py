# SPDX-License-Identifier: GPL-3.0-only
"""Namespaces that end, and others that are then called or numbered like them.

The kind of fault: what is counted, or what it is called, is bound to a name or a number
that something else has by now.
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
"""Enters a namespace when told to."""


def remake(name: str) -> None:
    """Another namespace of the same name."""
    for arguments in (("netns", "del", name), ("netns", "add", name)):
        subprocess.run(["ip", *arguments], check=True)


def refusal(exporter: Exporter, path: str) -> str:
    """What it answers with status 503."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        exporter.get(path)
    with raised.value as response:
        assert response.code == 503
        return response.read().decode()


@contextlib.contextmanager
def process(
    *prefix: str, program: str = STAY, argument: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A Python program in the namespace that ``prefix`` leads to, when it has begun.

    It gets the argument, and ends with its standard input at the end of the block.
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
    """503 and one warning while the name means none, the end when it means another.

    The new one can only be entered by a new start, which systemd makes after exit code 1.
    """
    with new_netns() as name:
        with inside(name):
            peers = Peers()
            peers.connect(3)
        arguments = ("--netns", name, "--source", source, "--duration", "0")
        with peers, Exporter(*arguments) as exporter:
            assert exporter.established(peers.port) == 3
            subprocess.run(["ip", "netns", "del", name], check=True)
            (NAMED / name).touch()  # as ip-netns(8) does before it mounts the namespace
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
    warnings = [line for line in log.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "any more: create it again" in warnings[0]
    assert log.splitlines()[-1].startswith(f"tcpexporter: /run/netns/{name} is another")


def test_the_watchdog_does_not_restart_for_a_missing_namespace(tmp_path: Path) -> None:
    """A restart would fail while the namespace is missing, and systemd would give up."""
    address = tmp_path / "notify"
    with Manager(str(address)) as manager, new_netns() as name:
        tmp_path.chmod(0o755)
        address.chmod(0o777)
        arguments = ("--netns", name, "--source", "sock_diag")
        with manager.start(*arguments, watchdog=True) as exporter:
            manager.wait_for("READY=1")
            subprocess.run(["ip", "netns", "del", name], check=True)
            refusal(exporter, "/-/ready")
            manager.forget()
            for _ in range(3):
                status, fed = manager.wait_for("WATCHDOG=1")
                assert status.startswith(f"STATUS=there is no network namespace {NAMED}")
                assert fed == "WATCHDOG=1"
            subprocess.run(["ip", "netns", "add", name], check=True)
            # Nobody has to ask for that.
            exporter.process.communicate(timeout=DEADLINE_S)
            assert exporter.process.returncode == 1


def test_a_namespace_that_gets_its_name_back_is_counted_again() -> None:
    """A name that is moved or mounted again means what it meant: nothing has to end."""
    with new_netns() as name, process("ip", "netns", "exec", name) as within:
        with Exporter("--netns", name, "--source", "sock_diag") as exporter:
            subprocess.run(["ip", "netns", "del", name], check=True)
            refusal(exporter, "/metrics")
            subprocess.run(["ip", "netns", "attach", name, str(within.pid)], check=True)
            assert exporter.is_ready()
            assert exporter.stop()[0] == 0


def test_the_namespace_of_a_process_ends_with_it() -> None:
    """A path in /proc, which a confined process may not follow."""
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


def test_a_process_that_enters_another_namespace_takes_its_path_along() -> None:
    """That is seen, too, though the process itself may not be looked into."""
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
    """Where only root may search /run/netns, names and their changes are not seen."""
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


def test_once_prints_nothing_of_a_namespace_that_is_another_by_then() -> None:
    """What it would print is of the old one."""
    with new_netns() as name:
        command = (sys.executable, "-m", "tcpexporter", "--once", "--netns", name)
        with subprocess.Popen(
            [*command, "--source", "sock_diag", "--duration", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as once:
            # It has given up root when it has entered the namespace.
            eventually(
                lambda: (
                    Path(f"/proc/{once.pid}").stat().st_uid != 0 or once.poll() is not None
                )
            )
            remake(name)
            page, complaint = once.communicate(timeout=DEADLINE_S)
    assert page == ""
    assert once.returncode == 1
    assert "is another network namespace now" in complaint


def test_an_unknown_namespace_is_a_wrong_setting() -> None:
    """Exit code 2, after which systemd does not start it again, and one sentence."""
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


def test_containers_that_a_pid_namespace_hides_are_warned_of() -> None:
    """/proc shows no process of the host there, and yet refuses nothing."""
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
    """A cgroup for each container, by its id."""
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
    """As `process`, in a cgroup; its number."""
    with process(*prefix) as running:
        (cgroup / "cgroup.procs").write_text(str(running.pid))
        yield running.pid


def number_of(process: int) -> int:
    return namespaces.inode(Path(f"/proc/{process}/ns/net"))


def test_a_name_is_that_of_a_container_until_its_namespace_is_let_go(
    cgroups: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else gets its number before; what gets it then is not that container."""
    with container(cgroups["a" * 64], "unshare", "--net") as process:
        number = number_of(process)
        tables = open_tables("sock_diag", "all")
        names = namespaces.Names(lambda: tables.namespaces().tolist())
    with contextlib.closing(tables):
        tables.established()
        assert names.read()[number] == "container:aaaaaaaaaaaa"
        monkeypatch.setattr(sockets, "FORGET_S", 0)
        tables.established()
        assert number not in names.read()


def test_a_namespace_that_containers_share_has_the_name_of_none(
    cgroups: dict[str, Path],
) -> None:
    """Which of them was looked at last would be a matter of chance."""
    with (
        container(cgroups["a" * 64], "unshare", "--net") as one,
        container(cgroups["b" * 64], "nsenter", f"--net=/proc/{one}/ns/net") as another,
    ):
        number = number_of(one)
        assert number_of(another) == number
        names = namespaces.Names(lambda: [number])
        assert names.read()[number] == str(number)


def test_a_namespace_is_read_once_whatever_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between being found and being opened one ends, one enters ours, one another."""
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
