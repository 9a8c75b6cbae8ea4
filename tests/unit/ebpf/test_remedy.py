# SPDX-License-Identifier: GPL-3.0-only
"""If the kernel refuses bpf(2), the error only has advice that can help in that context."""

from pathlib import Path

import pytest

from tcpexporter.ebpf.remedy import (
    WHOLE_UID_MAP,
    Context,
    despite_capabilities,
    detect,
    without_capabilities,
)
from tcpexporter.host.privileges import CAP_BPF, CAP_PERFMON, Status

ALL = (1 << 41) - 1
BOTH = 1 << CAP_BPF | 1 << CAP_PERFMON
NOTHING = 0


def status(
    uid: int = 0,
    *,
    effective: int = NOTHING,
    bounding: int = ALL,
    no_new_privs: bool = False,
    seccomp: int = 0,
) -> Status:
    ids = (uid,) * 4
    return Status(ids, ids, (), effective, effective, bounding, no_new_privs, seccomp)


@pytest.mark.parametrize(
    ("context", "advised", "not_advised"),
    [
        (
            Context(status(1000)),
            ("requires root, or", "sudo", "AmbientCapab"),
            ("--cap-add",),
        ),
        (Context(status(1000, no_new_privs=True)), ("AmbientCapabilities",), ("sudo",)),
        (Context(status(1000, bounding=0)), ("CapabilityBoundingSet",), ("sudo",)),
        (Context(status(bounding=0)), ("CapabilityBoundingSet",), ("sudo", "Ambient")),
        (Context(status(bounding=0), "Docker"), ("--cap-add BPF",), ("sudo", "--user")),
        (
            Context(status(1000, bounding=0), "Podman"),
            ("--cap-add", "--user 0"),
            ("sudo",),
        ),
        (Context(status(1000), "Docker"), ("sudo", "--user 0"), ("--cap-add",)),
        (
            Context(status(bounding=0), "Kubernetes"),
            ("capabilities.add",),
            ("runAsUser",),
        ),
        (
            Context(status(1000, bounding=0), "Kubernetes"),
            ("capabilities.add", "runAsUser: 0"),
            ("sudo",),
        ),
        (
            Context(status(bounding=0), "container"),
            ("to the container",),
            ("--cap-add",),
        ),
        (Context(status()), ("start the exporter with both in effect",), ("sudo",)),
        (
            Context(status(1000, bounding=0), "Docker", True),
            ("user namespace",),
            ("--cap",),
        ),
        (
            Context(status(bounding=1 << CAP_BPF, effective=1 << CAP_BPF)),
            ("lacks CAP_PERFMON:", "add CAP_PERFMON to the exporter's bounding set"),
            (),
        ),
    ],
)
def test_the_advice_for_missing_capabilities_can_help(
    context: Context, advised: tuple[str, ...], not_advised: tuple[str, ...]
) -> None:
    """The advice depends on the user, the bounding set, no_new_privs and the container.

    The kind of fault: the advice cannot help, such as sudo if root lacks the same
    capabilities.
    """
    sentence = without_capabilities(context)
    assert all(each in sentence for each in (*advised, "--source sock_diag")), sentence
    assert not any(each in sentence for each in not_advised), sentence


def test_the_advice_to_become_root_says_that_root_is_given_up() -> None:
    """A reader need not parse it twice: first what to do, then that it is safe."""
    advice = "start it with sudo, or start its container with --user 0; it gives up root"
    assert without_capabilities(Context(status(1000), "Docker")).endswith(
        f": {advice} before it serves. Or use --source sock_diag"
    )
    advice = "start the exporter with both in effect, or use --source sock_diag"
    assert without_capabilities(Context(status())).endswith(f": {advice}")


@pytest.mark.parametrize(
    ("context", "advised"),
    [
        (Context(status(effective=BOTH, seccomp=2)), "SystemCallFilter=bpf"),
        (
            Context(status(effective=BOTH, seccomp=2), "Docker"),
            "--security-opt seccomp=",
        ),
        (Context(status(effective=BOTH, seccomp=2), "Kubernetes"), "seccompProfile"),
        (Context(status(effective=BOTH)), "security module"),
        (
            Context(status(effective=ALL, seccomp=2), "Podman", True),
            "rootless container",
        ),
    ],
)
def test_the_advice_despite_capabilities_can_help(context: Context, advised: str) -> None:
    """The advice depends on the seccomp filter, the user namespace and the container."""
    sentence = despite_capabilities(context)
    assert advised in sentence
    assert "--source sock_diag" in sentence


@pytest.mark.parametrize(
    ("mark", "container"),
    [
        (".dockerenv", "Docker"),
        ("run/.containerenv", "Podman"),
        ("run/systemd/container", "container"),
        ("var/run/secrets/kubernetes.io/serviceaccount", "Kubernetes"),
        ("etc/passwd", ""),
    ],
)
def test_a_container_is_detected_by_files_of_its_engine(
    mark: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are files or directories; /proc/self/uid_map shows a user namespace."""
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    for made in (mark, "proc/self/uid_map"):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text(" ".join(WHOLE_UID_MAP))
    assert detect(tmp_path)[1:] == (container, False)
    (tmp_path / "proc/self/uid_map").write_text("0 1000 1\n")
    assert detect(tmp_path)[1:] == (container, True)
    monkeypatch.setenv("container", "lxc")
    assert detect(tmp_path).container == (container or "container")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert detect(tmp_path).container == "Kubernetes"
