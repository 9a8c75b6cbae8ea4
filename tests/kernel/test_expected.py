# SPDX-License-Identifier: GPL-3.0-only
"""--expect: the connections that must exist, and how soon a loss is reported."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.helpers.cgroups import new_cgroup
from tests.kernel.test_owners import entered
from tests.support import Exporter, Peers, eventually, inside, new_netns

EXPECTED = "tcp_expected_connections"
LONG_TERM = "tcp_expected_longterm_connections"
MINIMUM = "tcp_expected_minimum"

SOURCES = pytest.mark.parametrize("source", ["ebpf", "sock_diag", "procfs"])

DATABASE = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print(flush=True)
held = []
while True:
    held.append(listener.accept())
"""
"""A program that accepts connections and keeps them."""

PORT = 5432


def shown_by_ss(*condition: str) -> int:
    """Return how many established connections satisfy a condition of ss(8)."""
    command = ["ss", "-Htn", "state", "established", *condition]
    return len(subprocess.check_output(command, text=True).splitlines())


def found(exporter: Exporter) -> list[float | None]:
    names = ("six", "client", "server", "all")
    return [exporter.value(EXPECTED, name=each) for each in names]


@SOURCES
def test_a_rule_counts_what_ss_counts(source: str) -> None:
    """Both ends are counted, whatever the ports and the direction of the settings are."""
    with Peers("127.0.0.1") as four, Peers("::1") as six:
        rules = {
            "client": f"remote=127.0.0.0/8:{four.port},min=3",
            "server": f"local=127.0.0.1:{four.port},direction=inbound",
            "six": f"remote=[::1]:{six.port}",
            "all": "remote=[::]/0,local=[::]/0:1-65535",
            "none": "remote=192.0.2.1",
        }
        flags = [f"--expect={name}={rule}" for name, rule in rules.items()]
        fixed = ("--source", source, "--port", "1", "--interval", "0.1", *flags)
        four.connect(5)
        with Exporter(*fixed) as exporter:
            four.connect(2)
            six.connect(11)
            # One dump can miss a connection while others open or close.
            eventually(lambda: found(exporter) == [11, 7, 7, 22])
            assert (
                shown_by_ss(f"( dport = :{four.port} )", "and", "dst", "127.0.0.0/8") == 7
            )
            assert shown_by_ss("-6") == 22
            assert exporter.value(EXPECTED, name="none") == 0
            assert exporter.value(MINIMUM, name="client") == 3
            assert exporter.value(MINIMUM, name="none") == 1


def test_a_rule_of_a_unit_counts_the_connections_of_that_unit() -> None:
    """No label is required for that."""
    with new_cgroup("app.service") as cgroup, contextlib.ExitStack() as opened:
        peers = opened.enter_context(Peers())
        rules = (
            f"app=remote=127.0.0.1:{peers.port},unit=app.service",
            "db=unit=db.service",
        )
        exporter = opened.enter_context(Exporter(*(f"--expect={each}" for each in rules)))
        peers.connect(3)
        with entered(cgroup):
            peers.connect(5)
        eventually(lambda: exporter.value(EXPECTED, name="app") == 5)
        assert exporter.value(EXPECTED, name="db") == 0


def test_a_reload_replaces_the_rules(tmp_path: Path) -> None:
    """A refused rule changes nothing."""
    conf = tmp_path / "exporter.conf"
    with Peers() as peers:
        conf.write_text(f"expect one=local=:{peers.port}\n")
        with Exporter("--conf", str(conf)) as exporter:
            peers.connect(3)
            assert exporter.value(EXPECTED, name="one") == 3

            def reload(text: str) -> None:
                conf.write_text(text)
                exporter.process.send_signal(signal.SIGHUP)

            reload(f"expect two=local=:{peers.port},min=2\nexpect three=remote=192.0.2.1\n")
            eventually(lambda: exporter.value(MINIMUM, name="two") == 2)
            assert exporter.value(EXPECTED, name="one") is None
            assert exporter.value(EXPECTED, name="three") == 0
            reload("expect two=remote=db.example.com\n")
            name = "tcpexporter_config_last_reload_successful"
            eventually(lambda: exporter.value(name) == 0)
            assert exporter.value(EXPECTED, name="two") == 3
            reload(f"expect two=local=:{peers.port}\n")
            eventually(lambda: exporter.value(name) == 1)
            reload("expect two=unit=nginx.service\n")
            eventually(lambda: exporter.value(name) == 0)
            _, log = exporter.stop()
            assert "is a host name" in log
            assert "restart the exporter" in log


class Application:
    """A process in a namespace of its own, with a connection to a database in another."""

    def __init__(self, netns: str, database: "subprocess.Popen[str]") -> None:
        self.netns = netns
        self.database = database
        self.client = socket.create_connection(("198.51.100.1", PORT))
        # The kernel gives the connection up after a second without an answer.
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            self.client.setsockopt(socket.IPPROTO_TCP, option, 1)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)


@pytest.fixture
def application() -> Iterator[Application]:
    """The test is in the namespace of the application."""
    here, there = "198.51.100.2/24", "198.51.100.1/24"
    with new_netns() as netns, contextlib.ExitStack() as opened:
        name = f"veth{netns[-6:]}"
        for command in (
            f"ip link add {name} type veth peer name db netns {netns}",
            f"ip address add {here} dev {name}",
            f"ip link set {name} up",
            f"ip -n {netns} address add {there} dev db",
            f"ip -n {netns} link set db up",
        ):
            subprocess.run(command.split(), check=True)
        with inside(netns):
            database = opened.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", DATABASE, "198.51.100.1", str(PORT)],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        opened.callback(database.kill)
        assert database.stdout
        database.stdout.readline()
        made = Application(netns, database)
        opened.callback(made.client.close)
        yield made


def kill(application: Application) -> None:
    application.database.kill()


def half_close(application: Application) -> None:
    application.client.shutdown(socket.SHUT_WR)


def drop_traffic(application: Application) -> None:
    """Let the database's host drop every answer, because it has no route."""
    command = (
        "ip",
        "-n",
        application.netns,
        "route",
        "add",
        "blackhole",
        "198.51.100.2/32",
    )
    subprocess.run(command, check=True)


def filter_traffic(application: Application) -> None:
    """Let a firewall at the database's host drop every packet that arrives."""
    with inside(application.netns):
        subprocess.run(["iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP"], check=True)

        def has_dropped() -> bool:
            command = ["iptables", "-L", "INPUT", "-nvx"]
            *_, rule = subprocess.check_output(command, text=True).splitlines()
            packets, _, target, *_ = rule.split()
            return target == "DROP" and int(packets) > 0

        eventually(has_dropped)


def remove_link(application: Application) -> None:
    """Remove the device between the namespaces, as when that of the database is deleted."""
    subprocess.run(["ip", "-n", application.netns, "link", "delete", "db"], check=True)


LOSSES = (kill, half_close, drop_traffic, filter_traffic, remove_link)
"""How the database is lost."""


@pytest.mark.any_kernel
@pytest.mark.parametrize("lose", LOSSES, ids=lambda each: each.__name__)
def test_a_lost_connection_is_not_counted_any_more(
    application: Application, lose: Callable[[Application], None]
) -> None:
    """The kernel reports the loss at once, or when the peer has not answered."""
    rule = f"--expect=db=remote=198.51.100.1:{PORT}"
    with Exporter("--source", "ebpf", "--duration", "0", rule) as exporter:
        assert exporter.value(LONG_TERM, name="db") == 1
        lost_s = time.monotonic()
        lose(application)
        eventually(lambda: exporter.value(LONG_TERM, name="db") == 0)
        took_s = time.monotonic() - lost_s
        sys.stdout.write(f"{lose.__name__}: {took_s:.2f} s\n")
        assert exporter.value(MINIMUM, name="db") == 1
