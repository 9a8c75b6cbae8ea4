# SPDX-License-Identifier: GPL-3.0-only
"""Says what would help where bpf(2) is refused, from what this process can see of why."""

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
"""By what the process runs in, as `Place.container` has it."""

BECOME_ROOT = {
    "": "start it as a systemd service with AmbientCapabilities=CAP_BPF CAP_PERFMON",
    "Kubernetes": "set runAsUser: 0, which it gives up after the start",
    "Docker": "start the container with --user 0, which it gives up after the start",
    "Podman": "start the container with --user 0, which it gives up after the start",
    "container": "start it as the container's root, which it gives up after the start",
}

ALLOW_BPF = {
    "": "in a systemd service SystemCallFilter=bpf",
    "Kubernetes": "seccompProfile of type Localhost with a profile that allows bpf",
    "Docker": "--security-opt seccomp=PROFILE with a profile that allows bpf",
    "Podman": "--security-opt seccomp=PROFILE with a profile that allows bpf",
    "container": "a profile that allows bpf",
}

WHOLE_UID_MAP = ["0", "0", "4294967295"]
"""What user_namespaces(7) has for the first user namespace, where bpf(2) can be used."""


class Place(NamedTuple):
    """What a process runs in."""

    status: Status
    container: str = ""
    """A key of `ADD_CAPABILITIES`; empty: none that could be detected."""
    is_in_user_namespace: bool = False


def detect(root: Path = Path("/")) -> Place:
    """What this process runs in, by what container engines leave there.

    Raises:
        PrivilegeError: /proc/self/status cannot be read.
    """
    try:
        mapped = (root / "proc/self/uid_map").read_text().split()
    except OSError:
        mapped = WHOLE_UID_MAP
    return Place(privileges.read_status(), _container(root), mapped != WHOLE_UID_MAP)


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


def without_capabilities(place: Place) -> str:
    """What to do where CAP_BPF or CAP_PERFMON is not in effect, in a sentence."""
    if place.is_in_user_namespace:
        return _in_user_namespace()
    status = place.status
    both = 1 << CAP_BPF | 1 << CAP_PERFMON
    missing = privileges.names(both & ~status.effective)
    removed = both & ~status.bounding
    is_root = status.uids[1] == 0
    required = "CAP_BPF and CAP_PERFMON" if is_root else "root, or CAP_BPF and CAP_PERFMON"
    remedies = [*_capabilities_again(place, removed, is_root=is_root)]
    if not is_root:
        remedies.append(_root_again(place, can_use_sudo=not removed))
    remedy = ", and ".join(remedies)
    return f"BPF requires {required}, but {missing} is not in effect: {remedy}, {OR_POLL}"


def _capabilities_again(place: Place, removed: int, *, is_root: bool) -> Iterator[str]:
    if place.container and (removed or is_root):
        yield ADD_CAPABILITIES[place.container]
    elif removed:
        yield (
            f"add {privileges.names(removed)} to the bounding set that it is started with"
            " (in a systemd service CapabilityBoundingSet=)"
        )
    elif is_root:
        yield "start it with both in effect"


def _root_again(place: Place, *, can_use_sudo: bool) -> str:
    ways = []
    if can_use_sudo and not place.status.no_new_privs:
        ways.append("start it with sudo")
    ways.append(BECOME_ROOT[place.container])
    return ", or ".join(ways)


def despite_capabilities(place: Place) -> str:
    """What to do where bpf(2) is refused to a process that has them, in a sentence."""
    if place.is_in_user_namespace:
        return _in_user_namespace()
    if place.status.seccomp:
        why = f"allow it in the seccomp filter ({ALLOW_BPF[place.container]})"
    else:
        why = (
            "look in the kernel's log for the security module (SELinux, AppArmor) that"
            " refuses it, and whether the kernel has CONFIG_BPF_SYSCALL"
        )
    return f"the kernel refuses bpf(2) in spite of our privilege: {why}, {OR_POLL}"


def _in_user_namespace() -> str:
    return (
        "the kernel refuses bpf(2) in a user namespace, whatever its capabilities: start it"
        f" outside of that (not in a rootless container), {OR_POLL}"
    )
