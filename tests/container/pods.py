# SPDX-License-Identifier: GPL-3.0-only
"""Renders deploy/kubernetes with kubectl, and runs workloads as Pods of podman."""

import contextlib
import copy
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.container.kubectl import KUBECTL
from tests.container.podman import Exporter, podman

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

REGISTRY = "registry.example"

APP = """\
import socket, time
listener = socket.create_server(("127.0.0.1", 7007))
held = []
for _ in range(5):
    held.append(socket.create_connection(("127.0.0.1", 7007)))
    held.append(listener.accept())
time.sleep(1000)
"""
"""The application of the examples: a listener with five connections to it."""

APP_PORT = 7007


def render(directory: Path) -> str:
    """Return what `kubectl kustomize` prints; fail if it warns."""
    done = subprocess.run(
        [KUBECTL, "kustomize", directory], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def objects(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the rendered objects by kind; there is one of each kind."""
    found = [each for each in yaml.safe_load_all(render(directory)) if each]
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found)
    return by_kind


def pod_of(workload: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the Pod that a controller would create, as far as podman 4.3 supports it.

    - Probes are left out: podman would run them with a shell and curl, which are not there.
    - A native sidecar becomes the first container: podman waits until each init container
      has ended.
    - Ports are left out: podman would publish them, also with hostNetwork.
    - The seccomp profile Unconfined becomes an annotation.
    """
    spec = copy.deepcopy(workload["spec"]["template"]["spec"])
    sidecars = spec.pop("initContainers", [])
    spec["containers"] = [*sidecars, *spec["containers"]]
    annotations = {}
    for each in spec["containers"]:
        each.pop("restartPolicy", None)
        each.pop("ports", None)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            each.pop(probe, None)
        each["image"] = each["image"].replace(f"{REGISTRY}/", "localhost/")
        if each["name"] == "app":
            each["image"] = "localhost/tcpexporter:polling"
            each["command"] = ["python3", "-c", APP]
        profile = each.get("securityContext", {}).get("seccompProfile", {})
        if profile.get("type") == "Unconfined":
            key = f"container.seccomp.security.alpha.kubernetes.io/{each['name']}"
            annotations[key] = "unconfined"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": spec,
    }


@contextlib.contextmanager
def playing(pod: dict[str, Any], *options: str) -> Iterator[Exporter]:
    """Run a Pod with `podman kube play`, then remove it; yield its exporter.

    Args:
        pod: the Pod; its exporter is the container with the name tcpexporter.
        options: as in podman-kube-play(1).
    """
    name = pod["metadata"]["name"]
    try:
        podman("kube", "play", *options, "-", stdin=yaml.safe_dump(pod))
        yield Exporter(f"{name}-tcpexporter")
        podman("stop", "--time=10", f"{name}-tcpexporter")
    finally:
        podman("pod", "rm", "--force", "--time=0", "--ignore", name)


def options_of(pod: dict[str, Any]) -> list[str]:
    """Return the options of podman-run(1) for a Pod with one container and hostPID.

    `podman kube play` of podman 4.3 does not support hostPID.
    """
    spec = pod["spec"]
    assert spec["hostPID"]
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["seccompProfile"] == {"type": "Unconfined"}
    paths = {each["name"]: each["hostPath"]["path"] for each in spec["volumes"]}
    volumes = [
        f"--volume={paths[each['name']]}:{each['mountPath']}:"
        f"{'ro' if each.get('readOnly') else 'rw'}"
        for each in container["volumeMounts"]
    ]
    return [
        *("--pid=host", "--read-only", "--security-opt=no-new-privileges"),
        *("--security-opt=seccomp=unconfined", "--cap-drop=all"),
        f"--cap-add={','.join(context['capabilities']['add'])}",
        f"--user={context['runAsUser']}:{context['runAsGroup']}",
        *volumes,
    ]


def unique(name: str) -> str:
    """Return a name for a Pod or a directory that no other test run uses."""
    return f"tcpexporter-test-{name}-{os.getpid()}"


def probes_of(container: dict[str, Any]) -> Sequence[str]:
    """Return the paths that the kubelet requests."""
    return [
        container[each]["httpGet"]["path"]
        for each in ("startupProbe", "readinessProbe", "livenessProbe")
        if each in container
    ]
