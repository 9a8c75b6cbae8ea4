# SPDX-License-Identifier: GPL-3.0-only
"""Runs the images of `make image` in containers, by podman and runc."""

import contextlib
import http.client
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support import DEADLINE_S, ESTABLISHED

BPF = "localhost/tcpexporter:bpf"
POLLING = "localhost/tcpexporter:polling"
PORT = 9690

ENVIRONMENT = os.environ | {
    "CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))
}


def podman(*arguments: str | Path, stdin: str | None = None) -> str:
    """Run podman and return its output; fail with its messages."""
    done = subprocess.run(
        ["podman", *arguments],
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_python(image: str, program: str) -> str:
    """Run a program with the Python of an image, and return its output."""
    return podman(
        *("run", "--rm", "--no-healthcheck", "--network=host"),
        *("--entrypoint=python3", image, "-W", "error", "-c", program),
    )


class Exporter:
    """An exporter in a container that has already started."""

    def __init__(self, container: str) -> None:
        self.container = container
        """The id of the container."""

    def log(self) -> str:
        """Return the output of the exporter until now."""
        done = subprocess.run(
            ["podman", "logs", self.container],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return done.stdout

    def exit_code(self) -> int:
        """Wait until the exporter has ended; return its exit code."""
        return int(podman("wait", self.container))

    def wait_until_ready(self, port: int = PORT) -> None:
        until = time.monotonic() + DEADLINE_S
        while get("/-/ready", port) is None:
            state = podman("inspect", "--format={{.State.Running}}", self.container)
            assert state == "true", self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.05)

    def warnings(self) -> list[str]:
        """Return the lines of the log that are more severe than INFO, without time."""
        lines = [line.split(" ", 2)[-1] for line in self.log().splitlines()]
        return [each for each in lines if not each.startswith(("INFO ", "DEBUG "))]


@contextlib.contextmanager
def running(
    image: str, *options: str, arguments: tuple[str, ...] = ()
) -> Iterator[Exporter]:
    """Run an image in a container in the network namespace of the test, then remove it.

    Args:
        image: the name of the image.
        options: as in podman-run(1); --network chooses another namespace.
        arguments: the flags of the exporter.
    """
    run = ["run", "--detach", "--no-healthcheck"]
    if not any(each.startswith("--network") for each in options):
        # The host's network is that of the process which runs podman: the test's.
        run.append("--network=host")
    container = podman(*run, *options, image, *arguments)
    try:
        yield Exporter(container)
    finally:
        podman("rm", "--force", "--time=5", container)


def get(path: str, port: int = PORT) -> str | None:
    """Return a page of the exporter in this network namespace; None if it is not 200."""
    connection = http.client.HTTPConnection("localhost", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
    except OSError:
        return None
    finally:
        connection.close()
    return text if response.status == http.client.OK else None


def is_a_process_hidden() -> bool:
    """Return whether root cannot see the namespaces of each process, as in some VMs."""
    try:
        Path("/proc/1/ns/net").readlink()
    except PermissionError:
        return True
    return False


def established(**labels: str) -> float | None:
    """Scrape once; return the established connections with exactly these labels."""
    for family in text_string_to_metric_families(get("/metrics") or ""):
        for sample in family.samples:
            if sample.name == ESTABLISHED and sample.labels == labels:
                return float(sample.value)
    return None


def pid_of(container: str) -> int:
    """Return the id of the first process of a container."""
    return int(podman("inspect", "--format={{.State.Pid}}", container))


def why_no_containers() -> str | None:
    """Return why these tests cannot run here, or None if they can."""
    if os.geteuid() != 0:
        return "container tests require root"
    for each in (BPF, POLLING):
        found = subprocess.run(["podman", "image", "exists", each], check=False)
        if found.returncode:
            return f"there is no image {each}: run make image"
    return None
