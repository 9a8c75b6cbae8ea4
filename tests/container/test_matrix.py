# SPDX-License-Identifier: GPL-3.0-only
"""Each usual kind of container: the exporter counts, or one sentence says what is missing.

The containers are real: podman and runc start them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.container.podman import BPF, POLLING, get, running
from tests.support import Peers

NO_CAPABILITIES = "--cap-drop=all"
FOR_BPF = (NO_CAPABILITIES, "--cap-add=BPF,PERFMON")
NOBODY = "--user=65534:65534"
NO_SECCOMP = "--security-opt=seccomp=unconfined"
NO_NEW_PRIVILEGES = "--security-opt=no-new-privileges"
READ_ONLY = ("--read-only", "--read-only-tmpfs=false")

OF_DOCKER = (
    NO_CAPABILITIES,
    "--cap-add=AUDIT_WRITE,CHOWN,DAC_OVERRIDE,FOWNER,FSETID,KILL,MKNOD",
    "--cap-add=NET_BIND_SERVICE,NET_RAW,SETFCAP,SETGID,SETPCAP,SETUID,SYS_CHROOT",
)
"""The capabilities that Docker gives to a container by default."""

NOT_IN_EFFECT = (
    "this process lacks CAP_PERFMON, CAP_BPF: start the container with --cap-add BPF"
)
SECCOMP = (
    "the kernel refuses bpf(2) although this process has the capabilities: allow it in the"
    " seccomp"
)
"""Parts of the sentences about what BPF lacks."""


@dataclass(frozen=True)
class Row:
    """A kind of container, and what the exporter says in it."""

    options: tuple[str, ...]
    missing: str = ""
    """Part of the sentence about what BPF lacks; empty: BPF works."""
    left: tuple[str, ...] = ()
    """What the warning about privileges names; empty: there is no warning."""


IDS = ("user 0 (CAP_SETUID is missing)", "group 0 (CAP_SETGID is missing)")
BOUNDING = "(CAP_SETPCAP is missing)"

WITH_BPF = {
    "root, BPF and PERFMON": Row((*FOR_BPF, NO_SECCOMP), left=(*IDS, BOUNDING)),
    "root, and SETUID, SETGID": Row(
        (*FOR_BPF, "--cap-add=SETUID,SETGID", NO_SECCOMP), left=(BOUNDING,)
    ),
    "root, and SETPCAP": Row((*FOR_BPF, "--cap-add=SETUID,SETGID,SETPCAP", NO_SECCOMP)),
    "root, no capability": Row((NO_CAPABILITIES,), NOT_IN_EFFECT, IDS),
    "nobody, no capability": Row((NO_CAPABILITIES, NOBODY), NOT_IN_EFFECT),
    "nobody, BPF and PERFMON ambient": Row((*FOR_BPF, NOBODY, NO_SECCOMP)),
    "Docker's capabilities": Row(OF_DOCKER, NOT_IN_EFFECT),
    "read-only root": Row((*FOR_BPF, *READ_ONLY, NO_SECCOMP), left=(*IDS, BOUNDING)),
    "no-new-privileges": Row(
        (*FOR_BPF, NO_NEW_PRIVILEGES, NO_SECCOMP), left=(*IDS, BOUNDING)
    ),
    "seccomp of podman 4.3": Row(FOR_BPF, SECCOMP, (*IDS, BOUNDING)),
    "privileged": Row(("--privileged",)),
}
"""Kinds of containers for the image with BCC."""


@pytest.mark.parametrize("row", WITH_BPF.values(), ids=WITH_BPF)
def test_bpf_counts_or_names_what_is_missing(row: Row) -> None:
    """If --source ebpf is required and does not work, the exporter ends with one sentence.

    Otherwise it polls, and the same sentence is a warning. The count is correct in each
    case. The log never has a traceback.
    """
    assert_row(BPF, row)


def assert_row(image: str, row: Row, *options: str) -> None:
    with Peers() as peers:
        peers.connect(3)
        if row.missing:
            assert_refused(image, row, *options)
        arguments = () if row.missing else ("--source", "ebpf")
        with running(image, *row.options, *options, arguments=arguments) as exporter:
            exporter.wait_until_ready()
            assert_counted(peers.port, "sock_diag" if row.missing else "ebpf")
            warnings = exporter.warnings()
            if row.missing:
                assert row.missing in warnings.pop(0)
            if row.left:
                warning = warnings.pop(0)
                assert all(each in warning for each in row.left), warning
            assert not warnings


def assert_refused(image: str, row: Row, *options: str) -> None:
    arguments = ("--source", "ebpf")
    with running(image, *row.options, *options, arguments=arguments) as exporter:
        assert exporter.exit_code() == 1
        (sentence,) = (
            line for line in exporter.log().splitlines() if "listening on" not in line
        )
        assert sentence.startswith("tcpexporter: ")
        assert row.missing in sentence


def assert_counted(port: int, source: str) -> None:
    page = (get("/metrics") or "").splitlines()
    assert f'tcp_established_connections{{port="{port}",tcp_version="4"}} 3.0' in page
    assert f'tcpexporter_source_info{{source="{source}"}} 1.0' in page


NOT_AMBIENT = """
import os, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.execvp("tcpexporter", ["tcpexporter", *sys.argv[1:]])
"""
"""A program that executes the exporter as Docker does for an unprivileged user: the
capabilities are only in the bounding set."""


def test_capabilities_in_the_bounding_set_alone_are_not_in_effect() -> None:
    """Docker and Kubernetes give an unprivileged user no ambient capabilities.

    The sentence says that the user must be root.
    """
    options = (*FOR_BPF, "--cap-add=SETUID,SETGID", NO_SECCOMP, "--entrypoint=python3")
    arguments = ("-c", NOT_AMBIENT, "--source", "ebpf")
    with running(BPF, *options, arguments=arguments) as exporter:
        assert exporter.exit_code() == 1
        log = exporter.log()
        assert "this process lacks CAP_PERFMON, CAP_BPF" in log
        assert "start its container with --user 0; it gives up root before it serves" in log


def test_a_seccomp_profile_that_allows_bpf_with_its_capability(tmp_path: Path) -> None:
    """Newer profiles allow bpf(2) with CAP_BPF. This one is podman's, with that rule."""
    profile = json.loads(Path("/usr/share/containers/seccomp.json").read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [each for each in rule["names"] if each != "bpf"]
    profile["syscalls"].append(
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}}
    )
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    options = (
        *FOR_BPF,
        "--cap-add=SETUID,SETGID,SETPCAP",
        f"--security-opt=seccomp={path}",
    )
    assert_row(BPF, Row(options))


POLLED = {
    "as it is": (),
    "no capability": (NO_CAPABILITIES,),
    "restricted": (NO_CAPABILITIES, *READ_ONLY, NO_NEW_PRIVILEGES),
    "root, no capability": (NO_CAPABILITIES, "--user=0"),
    "another user": (NO_CAPABILITIES, "--user=1000:1000"),
    "Docker's capabilities": OF_DOCKER,
    "no seccomp profile": (NO_SECCOMP,),
    "privileged": ("--privileged",),
}
"""Kinds of containers for the image without BCC."""


@pytest.mark.parametrize("options", POLLED.values(), ids=POLLED)
def test_polling_requires_no_privilege(options: tuple[str, ...]) -> None:
    """Any user may count the connections of the container's network namespace."""
    with Peers() as peers:
        peers.connect(3)
        with running(POLLING, *options) as exporter:
            exporter.wait_until_ready()
            assert_counted(peers.port, "sock_diag")
            (*warnings,) = exporter.warnings()
            is_root_left = NO_CAPABILITIES in options and "--user=0" in options
            assert len(warnings) == is_root_left, warnings


def test_the_polling_image_says_that_it_cannot_use_bpf() -> None:
    """The sentence names the cause, whatever the capabilities."""
    options = (*FOR_BPF, "--user=0", NO_SECCOMP)
    with running(POLLING, *options, arguments=("--source", "ebpf")) as exporter:
        assert exporter.exit_code() == 1
        assert "libbpf is not installed" in exporter.log()
