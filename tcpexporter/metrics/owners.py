# SPDX-License-Identifier: GPL-3.0-only
"""Derives the systemd unit, the container and the pod from the path of a cgroup.

Runtimes can be nested: a container of one runtime can run another runtime. The innermost
container, unit and pod are the owners. So each component of the path is examined, from the
root to the leaf, and a later match replaces an earlier one.
"""

import re
from typing import NamedTuple

UNIT_SUFFIXES = (".service", ".scope", ".slice", ".socket")
"""The types of systemd units that have sockets; systemd.unit(5).

systemd opens the socket of a socket unit in that unit's cgroup, and its service accepts
connections from it: socket_address_listen_in_cgroup in systemd's src/core/socket.c."""

CONTAINER_DIGITS = 12
"""The container runtimes show this many digits of a container's id."""

_CONTAINER = re.compile(
    r"(?:[^:]*:)?"  # the slice, where containerd has the wrong cgroup driver
    r"(?:(?:cri-containerd|containerd|crio|docker|libpod|libpod-payload|nerdctl)[-:])?"
    r"([0-9a-f]{64})(?:\.scope)?"
)
"""A container with an id. The monitors crio-conmon-ID and libpod-conmon-ID do not match."""

_POD = re.compile(
    r"(?:.*-)?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"
    r"(?:\.slice(?::.*)?)?"
)
"""A Kubernetes pod. The uid of a static pod can be a hash of 32 digits."""

_MACHINE = re.compile(r"machine-(?!qemu\\x2d)(.+)\.scope|systemd-nspawn@(.+)\.service")
"""A container of systemd-nspawn, also if machinectl started it; not a virtual machine."""

_LXC = re.compile(r"lxc\.payload\.(.+)")
"""A container of LXC 4.0 or later, LXD or Incus. The monitor lxc.monitor.NAME has another
cgroup."""

_LXC_PARENTS = ("lxc", "lxc.payload")
"""Directories of containers of earlier LXC and of Proxmox VE."""

_PODMAN_PARENT = "libpod_parent"
"""Podman's directory (cgroupfs driver). An id without a prefix is a pod of Podman there."""

_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


class Owner(NamedTuple):
    """The owner of a cgroup: the values of the labels. An empty value: it has none."""

    cgroup: str
    """The path of the cgroup of the innermost unit, container or pod. Without any, it is
    the whole path. The label ``id`` of cAdvisor has the same form."""
    unit: str
    """The name of the innermost service, scope, slice or socket unit: systemctl(1)."""
    container: str
    """The first 12 digits of the innermost container's id, or its name (LXC, nspawn)."""
    pod: str
    """The uid of the innermost Kubernetes pod."""


def owner_of(path: str) -> Owner:
    """Return the owner of a cgroup.

    Args:
        path: the path as in /proc/PID/cgroup: "/" or "/system.slice/ssh.service".
    """
    unit, container, pod, depth = "", "", "", 0
    outside, parent, is_machine = "", "", False
    components = path.strip("/").split("/")
    for number, component in enumerate(components, start=1):
        is_supervisor = is_machine and component == "supervisor"
        is_machine, name = False, ""
        if component.endswith(UNIT_SUFFIXES):
            # systemd adds a "_" to names that could be attributes: cg_escape() in
            # src/basic/cgroup-util.c.
            unit, depth = component.removeprefix("_"), number
        if found := _POD.fullmatch(component):
            pod, depth = found[1].replace("_", "-"), number
        if found := _MACHINE.fullmatch(component):
            outside, container = container, _unescaped(found[1] or found[2])
            is_machine, depth = True, number
        elif is_supervisor:
            # The process systemd-nspawn itself runs here, outside of the container.
            container, depth = outside, number
        elif name := _container(component, parent):
            container, depth = name, number
        parent = "" if name else component  # a container can have the name "lxc"
    return Owner("/" + "/".join(components[: depth or None]), unit, container, pod)


def owner_of_unnamed(cgroup_id: int) -> Owner:
    """Return the owner of a cgroup whose path is not known: only its id, a number."""
    return Owner(str(cgroup_id), "", "", "")


def _container(component: str, parent: str) -> str:
    """Return a container's label; empty if the directory does not belong to a container."""
    if found := _CONTAINER.fullmatch(component):
        is_podmans_pod = parent == _PODMAN_PARENT and found[1] == component
        return "" if is_podmans_pod else found[1][:CONTAINER_DIGITS]
    if found := _LXC.fullmatch(component):
        return found[1]
    return component if parent in _LXC_PARENTS else ""


def _unescaped(name: str) -> str:
    r"""Return a name without systemd's escapes such as ``\x2d``; systemd.unit(5)."""
    raw = _ESCAPED.sub(lambda found: bytes((int(found[1], 16),)), name.encode())
    return raw.decode(errors="backslashreplace")
