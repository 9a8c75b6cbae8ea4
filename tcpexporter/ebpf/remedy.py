# SPDX-License-Identifier: GPL-3.0-only
"""Suggests a remedy if the kernel refuses bpf(2), for this user and container."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tcpexporter.host import privileges
from tcpexporter.host.privileges import CAP_BPF, CAP_PERFMON, Status

OR_POLL = "or use --source sock_diag"

ADD_CAPABILITIES = {
    "Kubernetes": "add [BPF, PERFMON] to the container's securityContext.capabilities.add",
    "Docker": "start the container with --cap-add BPF --cap-add PERFMON",
    "Podman": "start the container with --cap-add BPF --cap-add PERFMON",
    "container": "add CAP_BPF and CAP_PERFMON to the container",
}
"""The remedy for each container engine, as `Context.container` names it."""

BECOME_ROOT = {
    "": "start it as a systemd service with AmbientCapabilities=CAP_BPF CAP_PERFMON",
    "Kubernetes": "set runAsUser: 0",
    "Docker": "start its container with --user 0",
    "Podman": "start its container with --user 0",
    "container": "start it as the container's root",
}

ALLOW_BPF = {
    "": "in a systemd service SystemCallFilter=bpf",
    "Kubernetes": "seccompProfile of type Localhost with a profile that allows bpf",
    "Docker": "--security-opt seccomp=PROFILE with a profile that allows bpf",
    "Podman": "--security-opt seccomp=PROFILE with a profile that allows bpf",
    "container": "a profile that allows bpf",
}

WHOLE_UID_MAP = ["0", "0", "4294967295"]
"""The uid_map of the initial user namespace: bpf(2) is allowed only there."""


class Context(NamedTuple):
    """The privileges and the container of a process."""

    status: Status
    container: str = ""
    """A key of `ADD_CAPABILITIES`; empty: no container was detected."""
    is_in_user_namespace: bool = False


def detect(root: Path = Path("/")) -> Context:
    """Detect the container engine from the files that it creates, and the privileges.

    Raises:
        PrivilegeError: /proc/self/status cannot be read.
    """
    try:
        mapped = (root / "proc/self/uid_map").read_text().split()
    except OSError:
        mapped = WHOLE_UID_MAP
    return Context(privileges.read_status(), _container(root), mapped != WHOLE_UID_MAP)


def _container(root: Path) -> str:
    marks = {
        "var/run/secrets/kubernetes.io": "Kubernetes",
        ".dockerenv": "Docker",
        "run/.containerenv": "Podman",
        "run/systemd/container": "container",
    }
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "Kubernetes"
    found = [name for mark, name in marks.items() if os.path.lexists(root / mark)]
    return found[0] if found else "container" if "container" in os.environ else ""


def without_capabilities(context: Context) -> str:
    """Return cause and remedy for a process without effective CAP_BPF and CAP_PERFMON."""
    if context.is_in_user_namespace:
        return _in_user_namespace()
    status = context.status
    both = 1 << CAP_BPF | 1 << CAP_PERFMON
    missing = privileges.names(both & ~status.effective)
    removed = both & ~status.bounding
    is_root = status.uids[1] == 0
    required = "CAP_BPF and CAP_PERFMON" if is_root else "root, or CAP_BPF and CAP_PERFMON"
    remedies = [*_capabilities_again(context, removed, is_root=is_root)]
    ending = f", {OR_POLL}"
    if not is_root:
        remedies.append(_root_again(context, can_use_sudo=not removed))
        ending = f"; it gives up root before it serves. {OR_POLL.capitalize()}"
    remedy = ", and ".join(remedies)
    return f"BPF requires {required}; this process lacks {missing}: {remedy}{ending}"


def _capabilities_again(context: Context, removed: int, *, is_root: bool) -> Iterator[str]:
    if context.container and (removed or is_root):
        yield ADD_CAPABILITIES[context.container]
    elif removed:
        yield (
            f"add {privileges.names(removed)} to the exporter's bounding set (in a systemd"
            " service CapabilityBoundingSet=)"
        )
    elif is_root:
        yield "start the exporter with both in effect"


def _root_again(context: Context, *, can_use_sudo: bool) -> str:
    ways = []
    if can_use_sudo and not context.status.no_new_privs:
        ways.append("start it with sudo")
    ways.append(BECOME_ROOT[context.container])
    return ", or ".join(ways)


def despite_capabilities(context: Context) -> str:
    """Return cause and remedy if a process with both capabilities cannot use bpf(2)."""
    if context.is_in_user_namespace:
        return _in_user_namespace()
    if context.status.seccomp:
        why = f"allow it in the seccomp filter ({ALLOW_BPF[context.container]})"
    else:
        why = (
            "look in the kernel's log for the security module (SELinux, AppArmor) that"
            " refuses it, and check that the kernel has CONFIG_BPF_SYSCALL"
        )
    return (
        "the kernel refuses bpf(2) although this process has the capabilities:"
        f" {why}, {OR_POLL}"
    )


def _in_user_namespace() -> str:
    return (
        "the kernel refuses bpf(2) in a user namespace, whatever its capabilities: start"
        f" the exporter outside of it (not in a rootless container), {OR_POLL}"
    )
