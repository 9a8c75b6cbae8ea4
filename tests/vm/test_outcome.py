# SPDX-License-Identifier: GPL-3.0-only
"""The results that the table of kernels is made from; `make vm-test` runs the guests."""

import shutil
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vm import VmError, kernels, outcome, table
from tests.vm import __main__ as matrix
from tests.vm.images import BOOKWORM
from tests.vm.kernels import Kernel, Unpacked
from tests.vm.outcome import Guest, Outcome

SUITE = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_that_passes(number):
    pass

def test_that_fails():
    assert False

@pytest.fixture
def broken():
    raise OSError

def test_with_an_error(broken):
    pass

def test_that_is_skipped():
    pytest.skip("there is no moon")
"""

GOOD = Outcome(
    kernel="6.1",
    architecture="amd64",
    userland="Debian 12",
    seconds=61.3,
    passed=137,
    guest=Guest(
        release="6.1.0-56-amd64",
        version="#1 SMP",
        python="3.11.2",
        bcc="0.26.0",
        lacks=["recursion misses"],
        has_headers=False,
        has_compiler=False,
    ),
)


def test_each_kind_of_result_is_counted(tmp_path: Path) -> None:
    """An error counts as a failure, and a skip has its reason, in a file of pytest."""
    (tmp_path / "test_it.py").write_text(SUITE)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--junitxml=results.xml"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    counts = outcome.count(tmp_path / "results.xml")
    assert counts == {
        "passed": 3,
        "failed": ["test_it::test_that_fails", "test_it::test_with_an_error"],
        "skipped": {"test_it::test_that_is_skipped": "there is no moon"},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"passed": 0},
        {"failed": ["test_counting::test_it"]},
        {"why_not": "the guest ended without a result"},
    ],
)
def test_an_incomplete_result_is_not_a_success(change: dict[str, object]) -> None:
    """There is no test, a failed test, or a guest that ended too early."""
    assert GOOD.is_good
    assert not replace(GOOD, **change).is_good  # type: ignore[arg-type]


def test_written_outcomes_can_be_read(tmp_path: Path) -> None:
    """One of them is of a kernel without a guest."""
    outcomes = [GOOD, Outcome("5.10", "arm64", "Debian 12", why_not="no network")]
    outcome.write(outcomes, tmp_path / "kernels.json")
    assert outcome.read(tmp_path / "kernels.json") == outcomes


def test_the_table_has_remarks_about_missing_results() -> None:
    """The remarks name failed tests, reasons of skips, and the reason why a guest has no
    result."""
    shown = table.plain(
        [
            replace(GOOD, skipped={"a": "no MPTCP", "b": "no MPTCP", "c": "one CPU"}),
            replace(GOOD, kernel="6.12", failed=["test_slots::test_it"]),
            Outcome("7", "arm64", "Debian 13", why_not="it cannot be downloaded"),
        ]
    )
    assert "6.1 amd64 with Debian 12: 2 skipped: no MPTCP" in shown
    assert "6.1 amd64 with Debian 12: 1 skipped: one CPU" in shown
    assert "6.12 amd64 with Debian 12: test_slots::test_it failed" in shown
    assert "7 arm64 with Debian 13: it cannot be downloaded" in shown


@pytest.mark.skipif(not shutil.which("apt-get"), reason="there is no apt here")
def test_a_kernel_that_cannot_be_downloaded_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row has the reason; no guest boots, and no test counts as skipped."""
    monkeypatch.setattr(kernels, "CACHE", tmp_path)
    kernel = Kernel("2.6", ("no-such-release",))
    unpacked: Future[Unpacked] = Future()
    try:
        kernels.fetch(kernel)
    except VmError as error:
        unpacked.set_exception(error)
    image: Future[Path] = Future()
    image.set_result(tmp_path)
    result = matrix._outcome(matrix.Run(kernel, BOOKWORM), unpacked, image)
    assert not result.is_good
    assert result.why_not.startswith("kernel 2.6 cannot be downloaded: ")
    assert "no-such-release" in result.why_not


def names(kernel: str = "", arch: str | None = None) -> list[str]:
    return [each.name for each in matrix.chosen(kernel, arch)]


def test_one_kernel_of_arm64_runs_without_options() -> None:
    """All other runs of arm64 require the option --arch."""
    (only,) = (each for each in names() if "arm64" in each)
    assert only in names(arch="arm64")
    assert len(names(arch="arm64")) > 1


def test_a_kernel_is_chosen_by_name_and_architecture() -> None:
    """The default is amd64."""
    assert names("7") == ["7 amd64 with Debian 13", "7 amd64 with Debian 12"]
    assert names("7", "arm64") == ["7 arm64 with Debian 13"]
    assert names("6.13") == []
    assert names("6.12-16k") == []


def test_a_guest_has_the_architecture_of_its_kernel() -> None:
    """The root file system is for the same architecture."""
    for each in matrix.RUNS:
        assert each.kernel.architecture == each.userland.architecture
