# SPDX-License-Identifier: GPL-3.0-only
"""Every kernel test runs in a network namespace that is created for tests.

A test has its own namespace, unless it uses a shared exporter or tracker. A shared one has
a namespace for the whole run.
"""

import os
import resource
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tcpexporter.ebpf import pin_directory, pins
from tcpexporter.ebpf.tracker import Tracker
from tests.kernel.helpers.effort import Effort
from tests.kernel.helpers.in_process import attach
from tests.kernel.helpers.shared import Exporters, Trackers
from tests.support import Peers, inside, new_netns, why_no_bpf

DESCRIPTORS = 15_013
"""Limit of open files: more than the sockets that any test opens."""

BPF_FS = Path("/sys/fs/bpf")

HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def _bpf() -> None:
    """Skip the test without root or BCC, and raise the limit of open files."""
    if reason := why_no_bpf():
        pytest.skip(reason)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, DESCRIPTORS), max(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, wanted)


@pytest.fixture(autouse=True)
def netns(request: pytest.FixtureRequest, _bpf: None) -> Iterator[str]:
    """The name of the network namespace of the test and its child processes."""
    if "exporters" in request.fixturenames:
        yield from _enter(request.getfixturevalue("_netns_of_exporters"))
    elif "tracker" in request.fixturenames:
        yield from _enter(request.getfixturevalue("_trackers").shared.netns)
    else:
        with new_netns() as name:
            yield from _enter(name)


def _enter(name: str) -> Iterator[str]:
    with inside(name):
        yield name


@pytest.fixture(scope="session")
def _netns_of_exporters(_bpf: None) -> Iterator[str]:
    with new_netns() as name:
        yield name


@pytest.fixture(scope="session")
def exporters(_netns_of_exporters: str) -> Iterator[Exporters]:
    """Exporters shared by tests, selected by their arguments; see `Exporters`."""
    shared = Exporters()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def _trackers(_bpf: None) -> Iterator[Trackers]:
    shared = Trackers()
    yield shared
    shared.discard()


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest) -> Effort:
    """The share of each heavy test to run, from the option --effort."""
    return Effort(request.config.getoption("--effort"))


@pytest.fixture(scope="session")
def load_s(_bpf: None) -> float:
    """The time that loading the program requires on this machine, in seconds."""
    began_s = time.monotonic()
    attach().close()
    return time.monotonic() - began_s


@pytest.fixture
def tracker(request: pytest.FixtureRequest, _trackers: Trackers) -> Iterator[Tracker]:
    """An unseeded tracker with empty maps, attached to this namespace."""
    shared = _trackers.shared
    yield shared.fresh()
    if request.node.stash.get(HAS_FAILED, False) or not shared.is_quiet():
        _trackers.discard()


@pytest.fixture
def peers() -> Iterator[Peers]:
    with Peers() as opened:
        yield opened


@pytest.fixture
def directory() -> Iterator[Path]:
    """The path of a directory that does not exist, in the BPF file system. The file
    system is mounted if necessary."""
    if not pin_directory.is_bpf_file_system(BPF_FS):
        subprocess.run(["mount", "-t", "bpf", "bpf", BPF_FS], check=True)
    path = BPF_FS / f"tcpexporter-test-{os.getpid()}"
    yield path
    pins.remove(path)
