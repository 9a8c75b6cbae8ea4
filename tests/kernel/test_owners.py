# SPDX-License-Identifier: GPL-3.0-only
"""The labels unit, container and pod: the owners of real sockets in real cgroups.

The oracle is ss(8) with --cgroup, which asks the kernel for the cgroup of each socket.
"""

import contextlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.helpers.cgroups import Cgroup, mount_point, new_cgroup
from tests.kernel.helpers.containers import PORT, running_container
from tests.kernel.helpers.ss_oracle import by_unit
from tests.support import ESTABLISHED, Exporter, Peers, eventually

OPENED = "tcp_connections_opened_total"
INFO = "tcpexporter_owner_info"

LABELS = ("--labels", "port,tcp_version,direction,unit,container,pod", "--direction", "all")
BY_SOURCE = pytest.mark.parametrize("source", ["ebpf", "sock_diag"])

SERVING = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(listener.getsockname()[1], flush=True)
held = []
while True:
    held.append(listener.accept())
"""
"""A program that accepts connections and keeps them; it prints its port."""


@contextlib.contextmanager
def entered(cgroup: Cgroup) -> Iterator[None]:
    """Run the block in a cgroup: sockets that it creates belong to the cgroup."""
    mine = str(os.getpid())
    top = mount_point() / "cgroup.procs"
    (cgroup.directory / "cgroup.procs").write_text(mine)
    try:
        yield
    finally:
        top.write_text(mine)


def shown_by(exporter: Exporter, name: str = ESTABLISHED) -> Counter[str]:
    """Return the sums of a metric by unit, without those of other owners."""
    found: Counter[str] = Counter()
    for (sample, labels), value in exporter.samples().items():
        if sample == name and dict(labels)["unit"]:
            found[dict(labels)["unit"]] += int(value)
    return +found


def total(exporter: Exporter, name: str = ESTABLISHED) -> int:
    return sum(
        int(value) for (each, _), value in exporter.samples().items() if each == name
    )


@BY_SOURCE
def test_each_connection_has_the_owner_that_ss_shows(source: str) -> None:
    """Both ends have owners: an accepted socket has that of its listener.

    Connections before and after the start are counted in the same series.
    """
    with (
        new_cgroup("server.service") as server,
        new_cgroup("client.service") as client,
        contextlib.ExitStack() as opened,
    ):
        with entered(server):
            peers = opened.enter_context(Peers())
        with entered(client):
            peers.connect(7)
        exporter = opened.enter_context(Exporter("--source", source, *LABELS))
        with entered(client):
            peers.connect(11)
        eventually(lambda: shown_by(exporter)["client.service"] == 18)
        assert shown_by(exporter) == by_unit()
        assert by_unit() == {"server.service": 18, "client.service": 18}
        labels = {"tcp_version": "4", "direction": "inbound", "unit": "server.service"}
        found = exporter.value(ESTABLISHED, port=peers.port, container="", pod="", **labels)
        assert found == 18
        eventually(lambda: shown_by(exporter, OPENED)["server.service"] == 11)


@BY_SOURCE
def test_a_listener_has_a_series_at_0_with_its_owner(source: str) -> None:
    """An operator sees that a service has no client."""
    with new_cgroup("idle.service") as cgroup, contextlib.ExitStack() as opened:
        with entered(cgroup):
            peers = opened.enter_context(Peers())
        exporter = opened.enter_context(
            Exporter("--source", source, "--labels", "port,unit")
        )
        found = exporter.value(ESTABLISHED, port=peers.port, unit="idle.service")
        assert found == 0


def test_cgroups_of_one_unit_are_one_series() -> None:
    """A service may divide its processes among cgroups below its own."""
    with new_cgroup("divided.service") as above, contextlib.ExitStack() as opened:
        below = Cgroup(f"{above.path}/worker")
        peers = []
        for cgroup in (above, below):
            with entered(cgroup):
                peers.append(opened.enter_context(Peers()))
        exporter = opened.enter_context(Exporter("--labels", "unit"))
        peers[0].connect(3)
        peers[1].connect(5)
        eventually(lambda: shown_by(exporter) == {"divided.service": 8})
        assert exporter.value(INFO, **owner(above, "divided.service")) == 1


def owner(cgroup: Cgroup, unit: str) -> dict[str, str]:
    return {"cgroup": cgroup.path, "unit": unit, "container": "", "pod": ""}


def test_a_removed_cgroup_keeps_its_name_while_it_has_connections() -> None:
    """systemd removes the cgroup of a service that has ended; sockets can outlive it."""
    with new_cgroup("outlived.service") as cgroup, contextlib.ExitStack() as opened:
        exporter = opened.enter_context(Exporter("--labels", "port,unit"))
        with entered(cgroup):
            peers = opened.enter_context(Peers())
        peers.connect(7)
        eventually(lambda: shown_by(exporter)["outlived.service"] == 7)
        cgroup.remove()
        for _ in range(3):
            assert shown_by(exporter)["outlived.service"] == 7
        peers.close()
        eventually(lambda: not shown_by(exporter)["outlived.service"])
        assert exporter.value(OPENED, port=peers.port, unit="outlived.service") == 7


def test_every_connection_has_an_owner_during_a_rolling_restart() -> None:
    """Each start of a service has a new cgroup at the same path; clients connect again.

    In each scrape no connection is without an owner, and the sums over owners are those
    over ports.
    """
    with (
        new_cgroup("rolling.service") as cgroup,
        Exporter("--labels", "port,unit") as exporter,
        Exporter("--labels", "port") as by_port,
        contextlib.ExitStack() as opened,
    ):
        port = "0"
        for start in range(5):
            with cgroup.running(sys.executable, "-c", SERVING, port) as process:
                assert process.stdout
                port = process.stdout.readline().strip()
                for _ in range(11):
                    client = socket.create_connection(("127.0.0.1", int(port)))
                    opened.enter_context(client)
                    assert not exporter.value(ESTABLISHED, port=port, unit="")
                eventually(lambda: shown_by(exporter) == {"rolling.service": 11})
                assert shown_by(exporter) == by_unit()
                assert total(exporter) == total(by_port)
            cgroup.remove()
            cgroup.directory.mkdir()
            eventually(lambda: total(exporter) == 0)
            opened_before = exporter.value(OPENED, port=port, unit="rolling.service")
            assert opened_before == 11 * (start + 1)
        assert exporter.value(INFO, **owner(cgroup, "rolling.service")) == 1


def test_owners_are_known_after_the_settings_require_them(directory: Path) -> None:
    """A run without owners did not record them; the next one reads them from the tables."""
    pin = ("--source", "ebpf", "--pin", str(directory))
    with new_cgroup("pinned.service") as cgroup, entered(cgroup), Peers() as peers:
        with Exporter(*pin) as exporter:
            peers.connect(13)
            eventually(lambda: exporter.established(peers.port) == 13)
            exporter.stop()
        for _ in range(2):
            with Exporter(*pin, "--labels", "port,unit") as exporter:
                assert (
                    exporter.value(ESTABLISHED, port=peers.port, unit="pinned.service")
                    == 13
                )
                exporter.stop()


@pytest.mark.any_kernel
def test_procfs_has_no_owners_and_logs_that() -> None:
    """All connections of a port are counted in one series, with an empty label."""
    with (
        Peers() as peers,
        Exporter("--source", "procfs", "--labels", "port,unit") as running,
    ):
        peers.connect(7)
        eventually(lambda: running.value(ESTABLISHED, port=peers.port, unit="") == 7)
        _, log = running.stop()
        assert "the owners of connections are not known: procfs" in log


@pytest.mark.any_kernel
@BY_SOURCE
def test_a_real_container_has_its_id(source: str) -> None:
    """Podman runs it, with a network namespace of its own."""
    with (
        running_container() as container,
        Exporter(
            *("--source", source, "--labels", "port,container,netns", "--netns", "all")
        ) as exporter,
    ):
        short = container.id[:12]

        def established() -> int:
            return sum(
                int(value)
                for (name, labels), value in exporter.samples().items()
                if name == ESTABLISHED
                and dict(labels)["container"] == short
                and dict(labels)["port"] == str(PORT)
            )

        eventually(lambda: established() == 1)
        (info,) = (
            dict(labels)
            for (name, labels), _ in exporter.samples().items()
            if name == INFO and dict(labels)["container"] == short
        )
        assert info["cgroup"].endswith(container.id)


@pytest.mark.any_kernel
def test_a_container_that_starts_later_names_its_namespace() -> None:
    """The exporter has no privileges any more; the owner of the sockets has the name."""
    with Exporter("--netns", "all") as exporter, running_container() as container:
        name = f"container:{container.id[:12]}"
        eventually(lambda: exporter.established(PORT, netns=name) == 1)
