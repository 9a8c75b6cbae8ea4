# SPDX-License-Identifier: GPL-3.0-only
"""Builds the container images for another architecture, and copies their files."""

import os
import subprocess
from pathlib import Path

from tests.vm import ROOT, VmError
from tests.vm.architectures import Architecture

TARGETS = ("bpf", "polling")


def export(architecture: Architecture, into: Path) -> None:
    """Write ``bpf.tar``, ``bpf.json`` and the same for the image ``polling``.

    A tar file has the root file system of an image, and the JSON its entry point, user and
    environment variables.

    Raises:
        VmError: the images cannot be built; the message has the reason.
    """
    _run(
        str(ROOT / "deploy/container/build.sh"),
        env=os.environ | {"FOR_ARCH": architecture.name},
    )
    for target in TARGETS:
        image = f"localhost/tcpexporter:{target}-{architecture.name}"
        config = _run("podman", "image", "inspect", "--format={{json .Config}}", image)
        (into / f"{target}.json").write_text(config)
        root = _run("podman", "image", "mount", image).strip()
        try:
            _run("tar", "-C", root, "-cf", str(into / f"{target}.tar"), ".")
        finally:
            _run("podman", "image", "unmount", image)


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise VmError(f"{command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout
