# SPDX-License-Identifier: GPL-3.0-only
"""The commands in docs/containers.md work: podman runs them instead of Docker."""

import shlex
from collections.abc import Iterator

import pytest

from tests.container.podman import (
    POLLING,
    Exporter,
    established,
    is_a_process_hidden,
    pid_of,
    running,
)
from tests.container.pods import APP, APP_PORT, ROOT
from tests.documents.test_documents import commands_in
from tests.support import Peers, eventually, inside

PAGE = ROOT / "docs" / "containers.md"
COMMANDS = [each for each in commands_in(PAGE) if each.startswith("docker run ")]
(OF_CONTAINER,) = (each for each in COMMANDS if "container:app" in each)
(OF_ALL,) = (each for each in COMMANDS if "--netns all" in each)
OF_HOST = [each for each in COMMANDS if each not in (OF_CONTAINER, OF_ALL)]


@pytest.fixture
def app() -> Iterator[Exporter]:
    """Yield a container with its own network namespace, and five connections there."""
    options = ("--network=none", "--entrypoint=python3")
    with running(POLLING, *options, arguments=("-c", APP)) as container:
        yield container


def arguments_of(
    command: str, old: str = "", new: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments of a command for `running`: the options, the image, the rest."""
    words = shlex.split(command.removeprefix("docker run --detach ").replace(old, new))
    at = next(at for at, each in enumerate(words) if each.startswith("tcpexporter:"))
    return (words[at], *words[:at]), tuple(words[at + 1 :])


@pytest.mark.parametrize("command", OF_HOST)
def test_a_command_counts_the_connections_of_the_host(command: str, pins: str) -> None:
    """BPF works, and there is no warning."""
    run, arguments = arguments_of(command, "/sys/fs/bpf/tcpexporter", pins)
    with Peers() as peers, running(*run, arguments=arguments) as exporter:
        exporter.wait_until_ready()
        peers.connect(3)
        eventually(lambda: established(port=str(peers.port), tcp_version="4") == 3)
        assert not exporter.warnings()


def test_a_command_counts_the_connections_of_all_containers(app: Exporter) -> None:
    """The label container is the beginning of the other container's id."""
    run, arguments = arguments_of(OF_ALL)
    labels = {"port": str(APP_PORT), "tcp_version": "4", "container": app.container[:12]}
    with running(*run, arguments=arguments) as exporter:
        exporter.wait_until_ready()
        eventually(lambda: established(**labels) == 5)
        assert len(exporter.warnings()) == is_a_process_hidden()


def test_a_command_counts_the_connections_of_one_container(app: Exporter) -> None:
    """The exporter has no capability."""
    run, arguments = arguments_of(
        OF_CONTAINER, "container:app", f"container:{app.container}"
    )
    with (
        running(*run, arguments=arguments) as exporter,
        inside(f"/proc/{pid_of(app.container)}/ns/net"),
    ):
        exporter.wait_until_ready()
        eventually(lambda: established(port=str(APP_PORT), tcp_version="4") == 5)
        assert not exporter.warnings()
