# SPDX-License-Identifier: GPL-3.0-only
"""The owner of a cgroup, for paths that each container runtime really makes.

Cases with a version were recorded on Debian 12, with version 1 and version 2 of cgroups.
The others are from the documentation and the issues of the runtimes.
"""

import re
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.metrics.owners import Owner, owner_of, owner_of_unnamed

UUID = "16e6a747-9d40-4120-bbac-ca7cd274fdd9"
IN_SLICE = UUID.replace("-", "_")
"""A pod's uid, as it is in the name of a slice."""
HASH = "c704ef4c297ab11032b83ce52cbfc87b"
"""The uid of a static pod: a hash of its manifest."""
A = "57bd8c58f2231be4d4cd22704181eaad60345fe8cb3f2deb49f92eb01f84ab09"
B = "2327a2aec169e25cf05f2a901486b7463fdb513ae097fc0ae6a3ca94381ddc42"
SHORT_A, SHORT_B = A[:12], B[:12]

USER = "/user.slice/user-1000.slice/user@1000.service"
KUBEPODS = "/kubepods.slice/kubepods-burstable.slice"
POD = f"{KUBEPODS}/kubepods-burstable-pod{IN_SLICE}.slice"
KIND = (
    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
    f"/kubelet-kubepods-besteffort-pod{IN_SLICE}.slice"
)


class Case(NamedTuple):
    """A path of a runtime. After "|" there are directories below the owner's."""

    runtime: str
    driver: str
    path: str
    unit: str = ""
    container: str = ""
    pod: str = ""


CASES = [
    # The root cgroup, and directories of no known owner.
    Case("none", "", "/"),
    Case("none", "", "/custom/group"),
    Case("none", "", "/pod_123-456/name"),
    Case("none", "", "/kubepods/besteffort"),
    Case("none", "", f"/actions/{A[:-1]}"),
    # systemd
    Case("systemd", "", "/init.scope", "init.scope"),
    Case("systemd", "", "/system.slice", "system.slice"),
    Case("systemd", "", "/system.slice/nginx.service", "nginx.service"),
    Case("systemd", "", "/system.slice/ssh.socket", "ssh.socket"),
    Case("systemd", "", "/system.slice/nginx.service|/workers/1", "nginx.service"),
    Case(
        "systemd",
        "",
        "/system.slice/system-postgresql.slice/postgresql@15-main.service",
        "postgresql@15-main.service",
    ),
    Case(
        "systemd",
        "",
        "/system.slice/sshd@3-192.0.2.1:22-192.0.2.7:50112.service",
        "sshd@3-192.0.2.1:22-192.0.2.7:50112.service",
    ),
    Case(
        "systemd",
        "",
        r"/system.slice/system-modem\x2dmanager.slice/modem\x2dmanager@a.service",
        r"modem\x2dmanager@a.service",
    ),
    Case("systemd", "", "/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
    Case("systemd", "", f"{USER}/init.scope", "init.scope"),
    Case("systemd", "", f"{USER}/app.slice/app-foo.service", "app-foo.service"),
    Case(
        "systemd",
        "",
        f"{USER}/app.slice/app-gnome-firefox-2217.scope",
        "app-gnome-firefox-2217.scope",
    ),
    # cg_escape: the directory of a unit whose name could be a file of a controller
    Case("systemd", "", "/system.slice/_cpu.service", "cpu.service"),
    # A container's id in the name of a unit, which the container does not run in.
    Case("systemd", "", f"/system.slice/{A}.service", f"{A}.service"),
    Case(
        "systemd",
        "",
        f"/system.slice|/var-lib-docker-containers-{A}-mounts-shm.mount",
        "system.slice",
    ),
    # Docker
    Case("docker 20.10", "cgroupfs", f"/docker/{A}", "", SHORT_A),
    Case("docker 20.10 --cgroup-parent", "cgroupfs", f"/custom/{A}", "", SHORT_A),
    Case("docker", "cgroupfs", f"/docker/{A}|/init", "", SHORT_A),
    Case("docker", "cgroupfs", f"/ecs/{HASH}/{A}", "", SHORT_A),
    Case(
        "docker",
        "systemd",
        f"/system.slice/docker-{A}.scope",
        f"docker-{A}.scope",
        SHORT_A,
    ),
    Case(
        "docker",
        "systemd",
        f"/system.slice/docker-{A}.scope|/init",
        f"docker-{A}.scope",
        SHORT_A,
    ),
    Case(
        "docker rootless",
        "systemd",
        f"{USER}/user.slice/docker-{A}.scope",
        f"docker-{A}.scope",
        SHORT_A,
    ),
    Case("docker daemon", "systemd", "/system.slice/docker.service", "docker.service"),
    Case(
        "docker, systemd inside",
        "systemd",
        f"/system.slice/docker-{A}.scope/system.slice/nginx.service",
        "nginx.service",
        SHORT_A,
    ),
    # containerd, without Kubernetes
    Case("containerd", "cgroupfs", f"/default/{A}", "", SHORT_A),
    # ctr: the id of a container is any name, and the path does not show what it is.
    Case("containerd 1.6", "cgroupfs", "/example/web1"),
    Case("nerdctl", "cgroupfs", f"/k8s.io/{A}", "", SHORT_A),
    Case(
        "nerdctl",
        "systemd",
        f"/system.slice/nerdctl-{A}.scope",
        f"nerdctl-{A}.scope",
        SHORT_A,
    ),
    # Kubernetes
    Case(
        "containerd", "cgroupfs", f"/kubepods/besteffort/pod{UUID}/{A}", "", SHORT_A, UUID
    ),
    Case("containerd", "cgroupfs", f"/kubepods/pod{UUID}/{A}", "", SHORT_A, UUID),
    Case("containerd", "cgroupfs", f"/kubepods/burstable/pod{HASH}/{A}", "", SHORT_A, HASH),
    Case("no container", "cgroupfs", f"/kubepods/burstable/pod{UUID}", "", "", UUID),
    Case(
        "containerd",
        "cgroupfs",
        f"/kubepods/kubepods-besteffort/kubepods-besteffort-pod{IN_SLICE}/{A}",
        "",
        SHORT_A,
        UUID,
    ),
    Case(
        "containerd",
        "systemd",
        f"{POD}/cri-containerd-{A}.scope",
        f"cri-containerd-{A}.scope",
        SHORT_A,
        UUID,
    ),
    Case(
        "containerd, guaranteed",
        "systemd",
        f"/kubepods.slice/kubepods-pod{IN_SLICE}.slice/cri-containerd-{A}.scope",
        f"cri-containerd-{A}.scope",
        SHORT_A,
        UUID,
    ),
    Case(
        "containerd, static pod",
        "systemd",
        f"{KUBEPODS}/kubepods-burstable-pod{HASH}.slice/cri-containerd-{A}.scope",
        f"cri-containerd-{A}.scope",
        SHORT_A,
        HASH,
    ),
    Case(
        "containerd, other driver than the kubelet's",
        "cgroupfs",
        "/system.slice/containerd.service"
        f"/kubepods-besteffort-pod{IN_SLICE}.slice:cri-containerd:{A}",
        "containerd.service",
        SHORT_A,
        UUID,
    ),
    Case(
        "docker",
        "systemd",
        f"{POD}/docker-{A}.scope",
        f"docker-{A}.scope",
        SHORT_A,
        UUID,
    ),
    Case(
        "cri-o",
        "systemd",
        f"{POD}/crio-{A}.scope",
        f"crio-{A}.scope",
        SHORT_A,
        UUID,
    ),
    Case(
        "cri-o, crun",
        "systemd",
        f"{POD}/crio-{A}.scope|/container",
        f"crio-{A}.scope",
        SHORT_A,
        UUID,
    ),
    Case("cri-o", "cgroupfs", f"/kubepods/pod{UUID}/crio-{A}", "", SHORT_A, UUID),
    Case(
        "cri-o monitor",
        "systemd",
        f"{POD}/crio-conmon-{A}.scope",
        f"crio-conmon-{A}.scope",
        "",
        UUID,
    ),
    Case(
        "cri-o monitor", "cgroupfs", f"/kubepods/pod{UUID}|/crio-conmon-{A}", "", "", UUID
    ),
    Case(
        "no container",
        "systemd",
        POD,
        f"kubepods-burstable-pod{IN_SLICE}.slice",
        "",
        UUID,
    ),
    Case("kubelet", "systemd", "/system.slice/kubelet.service", "kubelet.service"),
    # Podman
    Case("podman 4.3, runc 1.1", "cgroupfs", f"/libpod_parent/libpod-{A}", "", SHORT_A),
    Case("podman pod", "cgroupfs", f"/libpod_parent/{B}/libpod-{A}", "", SHORT_A),
    Case("podman pod, no container", "cgroupfs", f"/libpod_parent/{B}"),
    Case("podman monitor", "cgroupfs", "/libpod_parent/conmon"),
    Case(
        "podman",
        "systemd",
        f"/machine.slice/libpod-{A}.scope",
        f"libpod-{A}.scope",
        SHORT_A,
    ),
    Case(
        "podman, crun",
        "systemd",
        f"/machine.slice/libpod-{A}.scope|/container",
        f"libpod-{A}.scope",
        SHORT_A,
    ),
    Case(
        "podman monitor",
        "systemd",
        f"/machine.slice/libpod-conmon-{A}.scope",
        f"libpod-conmon-{A}.scope",
    ),
    Case(
        "podman pod",
        "systemd",
        f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope",
        f"libpod-{A}.scope",
        SHORT_A,
    ),
    Case(
        "podman rootless",
        "systemd",
        f"{USER}/user.slice/libpod-{A}.scope|/container",
        f"libpod-{A}.scope",
        SHORT_A,
    ),
    Case(
        "podman rootless pod",
        "systemd",
        f"{USER}/user.slice/user-libpod_pod_{B}.slice/libpod-{A}.scope|/container",
        f"libpod-{A}.scope",
        SHORT_A,
    ),
    Case(
        "podman quadlet",
        "split",
        f"/system.slice/nginx.service/libpod-payload-{A}",
        "nginx.service",
        SHORT_A,
    ),
    Case(
        "podman quadlet, monitor",
        "split",
        "/system.slice/nginx.service|/runtime",
        "nginx.service",
    ),
    Case(
        "podman quadlet, rootless",
        "split",
        f"{USER}/app.slice/redis.service/libpod-payload-{A}",
        "redis.service",
        SHORT_A,
    ),
    # LXC, LXD and Incus
    Case("lxc 3", "cgroupfs", "/lxc/web", "", "web"),
    Case("lxc 3", "cgroupfs", "/lxc/lxc|/workers", "", "lxc"),
    Case("lxc 3.1", "cgroupfs", "/lxc.payload/web", "", "web"),
    Case("lxc 5.0", "cgroupfs", "/lxc.payload.web1", "", "web1"),
    Case("lxc 5.0, lxc-attach", "cgroupfs", "/lxc.payload.web1|/.lxc", "", "web1"),
    Case("lxc 5.0 monitor", "cgroupfs", "/lxc.monitor.web1"),
    Case("lxc 3.1 monitor", "cgroupfs", "/lxc.monitor/web"),
    Case(
        "lxc, systemd inside",
        "cgroupfs",
        "/lxc.payload.web/init.scope",
        "init.scope",
        "web",
    ),
    Case(
        "proxmox",
        "cgroupfs",
        "/lxc/101/ns/system.slice/nginx.service",
        "nginx.service",
        "101",
    ),
    Case("lxd project", "cgroupfs", "/lxc.payload.shop_web", "", "shop_web"),
    Case("waydroid", "cgroupfs", "/lxc.payload.waydroid2", "", "waydroid2"),
    # systemd-nspawn
    Case(
        "nspawn",
        "systemd",
        r"/machine.slice/machine-web\x2d1.scope|/payload",
        r"machine-web\x2d1.scope",
        "web-1",
    ),
    Case(
        "nspawn",
        "systemd",
        r"/machine.slice/machine-caf\xc3\xa9.scope",
        r"machine-caf\xc3\xa9.scope",
        "café",
    ),
    Case(
        "nspawn",
        "systemd",
        "/machine.slice/systemd-nspawn@web-1.service|/payload",
        "systemd-nspawn@web-1.service",
        "web-1",
    ),
    Case(
        "nspawn, systemd inside",
        "systemd",
        "/machine.slice/systemd-nspawn@jammy.service/payload/system.slice/ssh.service",
        "ssh.service",
        "jammy",
    ),
    Case(
        "nspawn itself",
        "systemd",
        "/machine.slice/systemd-nspawn@jammy.service/supervisor",
        "systemd-nspawn@jammy.service",
    ),
    Case(
        "virtual machine",
        "systemd",
        r"/machine.slice/machine-qemu\x2d1\x2dwin11.scope|/libvirt/emulator",
        r"machine-qemu\x2d1\x2dwin11.scope",
    ),
    Case(
        "libvirt lxc",
        "systemd",
        r"/machine.slice/machine-lxc\x2d12345\x2dweb.scope",
        r"machine-lxc\x2d12345\x2dweb.scope",
        "lxc-12345-web",
    ),
    # One runtime in another: the innermost container owns the socket.
    Case("docker in lxc", "cgroupfs", f"/lxc.payload.web/docker/{A}", "", SHORT_A),
    Case(
        "docker in lxc",
        "systemd",
        f"/lxc.payload.web/system.slice/docker-{A}.scope",
        f"docker-{A}.scope",
        SHORT_A,
    ),
    Case("docker in docker", "cgroupfs", f"/docker/{A}/docker/{B}", "", SHORT_B),
    Case(
        "docker in docker",
        "mixed",
        f"/system.slice/docker-{A}.scope/docker/{B}",
        f"docker-{A}.scope",
        SHORT_B,
    ),
    Case(
        "docker in a pod",
        "cgroupfs",
        f"/kubepods/burstable/pod{UUID}/{A}/docker/{B}",
        "",
        SHORT_B,
        UUID,
    ),
    Case(
        "kind",
        "systemd",
        f"/system.slice/docker-{A}.scope{KIND}/cri-containerd-{B}.scope",
        f"cri-containerd-{B}.scope",
        SHORT_B,
        UUID,
    ),
    Case(
        "kind",
        "mixed",
        f"/docker/{A}{KIND}/cri-containerd-{B}.scope",
        f"cri-containerd-{B}.scope",
        SHORT_B,
        UUID,
    ),
    Case(
        "kind with podman",
        "systemd",
        f"/machine.slice/libpod-{A}.scope/container{KIND}/cri-containerd-{B}.scope",
        f"cri-containerd-{B}.scope",
        SHORT_B,
        UUID,
    ),
    Case(
        "kind, the node",
        "systemd",
        f"/system.slice/docker-{A}.scope/kubelet.slice/kubelet.service",
        "kubelet.service",
        SHORT_A,
    ),
    Case("lxc in lxc", "cgroupfs", "/lxc.payload.outer/lxc.payload.inner", "", "inner"),
    Case(
        "nspawn itself in lxc",
        "systemd",
        "/lxc.payload.web/machine.slice/systemd-nspawn@a.service/supervisor",
        "systemd-nspawn@a.service",
        "web",
    ),
]


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.runtime}-{case.driver}-{case.path}" for case in CASES]
)
def test_the_path_of_a_cgroup_names_its_owner(case: Case) -> None:
    """Directories below the owner's do not change the owner."""
    owner, _, below = case.path.partition("|")
    expected = Owner(owner, case.unit, case.container, case.pod)
    assert owner_of(owner + below) == expected
    assert owner_of(owner) == expected


COMPONENTS = sorted(
    {
        component
        for case in CASES
        for component in re.split(r"[/|]+", case.path)
        if component
    }
)


@given(
    st.lists(
        st.sampled_from(COMPONENTS)
        | st.text(st.characters(exclude_characters="/")).filter(len)
    )
)
def test_any_path_has_one_owner(components: list[str]) -> None:
    """The path of an owner has the same owner, whatever the directories below are called.

    So `cgroup` identifies the owner. Users to whom systemd delegates cgroups can choose any
    names, and can nest them as no runtime does.
    """
    path = "/" + "/".join(components)
    owner = owner_of(path)
    assert f"{path}/".startswith(owner.cgroup)
    if any(owner[1:]):
        assert owner_of(owner.cgroup) == owner
        assert owner_of(f"{owner.cgroup}/workers/7") == owner
    else:
        assert owner.cgroup == path


def test_a_cgroup_without_a_path_has_its_number() -> None:
    assert owner_of_unnamed(4711) == Owner("4711", "", "", "")
