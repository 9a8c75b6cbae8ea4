# SPDX-License-Identifier: GPL-3.0-only
"""Tests the package and the images that another architecture's machine has built.

`make vm-test ARCH=arm64` runs these tests in guests.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import ESTABLISHED, LONG_TERM, Exporter, Peers, eventually
from tests.vm.rootfs import TARGETS

SHARE = Path("/share")
"""Has the files that `debs.build_for` or `rootfs.export` has written."""

VENV = Path("/usr/lib/tcpexporter")

DURATION_0 = ("--duration", "0")
"""Each open connection is long-term."""


def assert_counts(command: Sequence[str], source: str) -> None:
    """Assert that an exporter counts connections from before and after its start."""
    with Peers() as peers, Peers("::1") as peers6:
        peers.connect(5)
        peers6.connect(3)
        page = subprocess.check_output([*command, "--once", *DURATION_0], text=True)
        for name in (ESTABLISHED, LONG_TERM):
            assert f'{name}{{port="{peers.port}",tcp_version="4"}} 5.0\n' in page
            assert f'{name}{{port="{peers6.port}",tcp_version="6"}} 3.0\n' in page
        with Exporter(*DURATION_0, command=command) as exporter:
            assert exporter.value("tcpexporter_source_info", source=source) == 1
            peers.connect(2)
            eventually(lambda: exporter.long_term(peers.port) == 7)
            assert exporter.long_term(peers6.port, 6) == 3
            for end in peers.pairs.pop():
                end.close()
            eventually(lambda: exporter.established(peers.port) == 6)


def test_the_package_counts_by_bpf() -> None:
    """It is installed without error, and its command counts right.

    dpkg does not check the dependencies, because nothing has registered the packages of
    this guest. `debs.build_for` has checked them.
    """
    (package,) = SHARE.glob("*.deb")
    Path("/var/lib/dpkg/status").touch()
    # Without a terminal dpkg does not ask questions: it fails.
    subprocess.run(
        ["dpkg", "--force-depends", "--install", package],
        stdin=subprocess.DEVNULL,
        check=True,
    )
    assert len([*VENV.rglob("*.pyc")]) > 300
    assert_counts(["/usr/bin/tcpexporter"], "ebpf")


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_counts(target: str, tmp_path: Path) -> None:
    """Its entry point, as its user and with its environment, counts right in a chroot."""
    subprocess.run(["tar", "-C", tmp_path, "-xf", SHARE / f"{target}.tar"], check=True)
    for each in ("dev", "proc", "sys"):
        subprocess.run(["mount", "--rbind", f"/{each}", tmp_path / each], check=True)
    config = json.loads((SHARE / f"{target}.json").read_text())
    command = [
        *("env", "-i", *config["Env"]),
        *("/usr/sbin/chroot", f"--userspec={config['User']}", str(tmp_path)),
        *config["Entrypoint"],
    ]
    assert_counts(command, {"bpf": "ebpf", "polling": "sock_diag"}[target])
