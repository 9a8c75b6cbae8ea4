# SPDX-License-Identifier: GPL-3.0-only
"""The images have what the documents say: size, user, labels, health check, no shell."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.container.podman import BPF, POLLING, podman, run_python, running

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"

BOTH = pytest.mark.parametrize("image", [BPF, POLLING])
MEGABYTE = 1_000_000


def inspected(image: str) -> dict[str, Any]:
    (found,) = json.loads(podman("image", "inspect", image))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("image", "limit"), [(BPF, 330), (POLLING, 110)])
def test_the_size_is_within_its_limit(image: str, limit: int) -> None:
    """A new dependency, or a file that is no longer removed, makes it larger."""
    assert inspected(image)["Size"] <= limit * MEGABYTE


def test_only_the_image_for_bpf_starts_as_root() -> None:
    """Root is required for loading the program; the exporter gives it up."""
    assert inspected(BPF)["Config"]["User"] == "0:0"
    assert inspected(POLLING)["Config"]["User"] == "65534:65534"


@BOTH
def test_labels_name_the_version_and_the_commit(image: str) -> None:
    """The exporter shows the same commit."""
    labels = inspected(image)["Labels"]
    prefix = "org.opencontainers.image."
    assert {"title", "description", "licenses", "version", "revision"} <= {
        each.removeprefix(prefix) for each in labels
    }
    program = "from tcpexporter import version; print(version.VERSION, version.REVISION)"
    shown = run_python(image, program)
    assert shown.split() == [labels[f"{prefix}version"], labels[f"{prefix}revision"]]


@BOTH
def test_the_health_check_is_that_of_readiness(image: str) -> None:
    """It follows TCPEXPORTER_LISTEN, and fails if nothing listens."""
    check = inspected(image)["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    for listen in ("9690", "127.0.0.1:9777"):
        with running(image, f"--env=TCPEXPORTER_LISTEN={listen}") as exporter:
            exporter.wait_until_ready(int(listen.rpartition(":")[2]))
            podman("exec", exporter.container, *check[1:])
            wrong = ["podman", "exec", "--env=TCPEXPORTER_LISTEN=9778", exporter.container]
            assert subprocess.run([*wrong, *check[1:]], check=False).returncode == 1


@BOTH
def test_every_module_can_be_imported(image: str) -> None:
    """The kind of fault: a library or a module of Python was left out of the image."""
    without = [] if image == BPF else ["tcpexporter.bpf"]
    program = f"""
import importlib, pkgutil, tcpexporter
for each in pkgutil.walk_packages(tcpexporter.__path__, "tcpexporter."):
    if each.name not in {without} and not each.name.endswith("__main__"):
        importlib.import_module(each.name)
"""
    run_python(image, program)


@BOTH
def test_the_image_has_neither_a_shell_nor_an_installer(image: str) -> None:
    """An attacker finds Python only."""
    commands = run_python(
        image,
        "import os; print(*{name for each in os.environ['PATH'].split(':') + ['/usr/sbin']"
        " if os.path.isdir(each) for name in os.listdir(each)})",
    )
    assert set(commands.split()) == {"python", "python3", "python3.11", "tcpexporter"}


@BOTH
def test_the_image_lists_its_packages(image: str) -> None:
    """Scanners for vulnerabilities read this list."""
    status = run_python(image, "print(open('/var/lib/dpkg/status').read())")
    names = set(re.findall(r"(?m)^Package: (.+)$", status))
    assert {"libc6", "libseccomp2", "libssl3", "python3.11-minimal"} <= names
    assert ("libllvm14" in names) == (image == BPF)


def test_hadolint_accepts_the_containerfile() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), CONTAINERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
