# SPDX-License-Identifier: GPL-3.0-only
"""Runs the kernel tests in a guest of each kernel; each CPU runs one guest at a time."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.vm import CACHE, ROOT, VmError, debs, guest, images, kernels, outcome, table
from tests.vm.images import BOOKWORM, TRIXIE, VAGRANT, Userland
from tests.vm.kernels import KERNELS, Kernel, Unpacked
from tests.vm.outcome import Outcome

OUTPUT = ROOT / ".cache" / "vm"

LIMIT_S = 2700
"""Time limit of a guest, which suffices even on a busy machine."""

WHOLE = "tests/kernel"
PART = " ".join(
    f"{WHOLE}/test_{name}.py"
    for name in (
        "confinement",
        "counting",
        "features",
        "owners",
        "pins",
        "reconcile",
        "seeding",
        "series_numbers",
        "slots",
    )
)
"""The tests of what differs most between kernels."""

TEST = """
.venv/bin/python -m tests.vm.facts >/share/facts.json || exit
set -- -m "not any_kernel" --effort 0.05 --timeout 600 --junitxml=/share/results.xml
set -- "$@" --durations=20
.venv/bin/python -m pytest {what} -v --color=no "$@"
"""

SHELL = "TERM=linux exec bash </dev/ttyS0 >/dev/ttyS0 2>&1"


@dataclass(frozen=True)
class Run:
    """A kernel, and the userland and tests that run with it."""

    kernel: Kernel
    userland: Userland
    tests: str = WHOLE
    title: str = ""
    """A name of these tests, necessary if other tests have the same kernel and userland."""
    init: Path = guest.SESSION
    with_packages: bool = False
    """Whether the guest has the packages of `debs.build` in /share."""
    is_extra: bool = False
    """Whether it only runs if its kernel is named by --kernel."""

    @property
    def what(self) -> str:
        """Return the description of the run without its kernel."""
        return ", ".join(filter(None, [self.userland.name, self.title]))

    @property
    def name(self) -> str:
        return f"{self.kernel.name} with {self.what}"


NEWEST, *BETWEEN, OLDEST = reversed(KERNELS)

RUNS = (
    Run(NEWEST, TRIXIE),
    # Debian's older release does not have this kernel.
    Run(NEWEST, BOOKWORM, is_extra=True),
    *(Run(each, BOOKWORM, PART) for each in BETWEEN),
    Run(OLDEST, BOOKWORM),
    Run(KERNELS[1], VAGRANT, "tests/vm/service.py", init=guest.BOOT),
    Run(
        *(KERNELS[1], VAGRANT, "tests/vm/package.py", "package"),
        init=guest.BOOT,
        with_packages=True,
    ),
    # The newest of these kernels, and one on which the exporter keeps more privileges.
    *(Run(KERNELS[each], BOOKWORM, "tests/vm/faults.py", "faults") for each in (2, 0)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="", help="run this kernel only, such as 6.12")
    parser.add_argument("--shell", action="store_true", help="open a shell in the guest")
    arguments = parser.parse_args()
    runs = [
        each
        for each in RUNS
        if (arguments.kernel == each.kernel.name if arguments.kernel else not each.is_extra)
    ]
    if not runs:
        names = ", ".join(each.name for each in KERNELS)
        sys.exit(f"unknown kernel {arguments.kernel!r}: choose one of {names}")
    if os.geteuid() != 0:
        sys.exit("building root images requires root: use sudo")
    CACHE.mkdir(parents=True, exist_ok=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.shell:
            sys.exit(_shell(runs[0]))
        sys.exit(_test(runs, OUTPUT / f"{arguments.kernel or 'kernels'}.json"))
    except VmError as error:
        sys.exit(str(error))


def _shell(run: Run) -> int:
    unpacked, image = kernels.fetch(run.kernel), images.build(run.userland)
    with tempfile.TemporaryDirectory() as share:
        return guest.run(unpacked, image, Path(share), SHELL)


def _test(runs: Sequence[Run], kept: Path) -> int:
    with ThreadPoolExecutor() as preparing, ThreadPoolExecutor(os.cpu_count()) as testing:
        unpacked = {
            each: preparing.submit(kernels.fetch, each)
            for each in dict.fromkeys(run.kernel for run in runs)
        }
        built = {
            each: preparing.submit(images.build, each)
            for each in dict.fromkeys(run.userland for run in runs)
        }
        outcomes = list(
            testing.map(
                lambda run: _outcome(run, unpacked[run.kernel], built[run.userland]), runs
            )
        )
    outcome.write(outcomes, kept)
    sys.stdout.write(f"\n{table.plain(outcomes)}\n\nlogs of the guests: {OUTPUT}\n")
    return int(not all(each.is_good for each in outcomes))


def _outcome(run: Run, unpacked: Future[Unpacked], image: Future[Path]) -> Outcome:
    """Run the tests in a guest; return their results, or the reason why there are none."""
    result = Outcome(kernel=run.kernel.name, userland=run.what)
    log = OUTPUT / f"{run.kernel.name}-{images.slug(run.what)}.log"
    try:
        kernel, root = unpacked.result(), image.result()
        _print_line(f"{run.name}: booting {kernel.image.name}")
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            share = Path(directory)
            if run.with_packages:
                debs.build(share)
            command = TEST.format(what=run.tests)
            code = guest.run(
                kernel, root, share, command, init=run.init, log=log, limit_s=LIMIT_S
            )
            result = replace(
                result,
                seconds=time.monotonic() - began_s,
                guest=outcome.read_guest(share / "facts.json"),
                **outcome.count(share / "results.xml"),
            )
        if code and not result.failed:
            result = replace(result, why_not=f"pytest: exit code {code}, see {log}")
    except (VmError, OSError) as error:
        result = replace(result, why_not=str(error))
    _print_line(
        f"{run.name}: {result.passed} passed, {len(result.failed)} failed, "
        f"{len(result.skipped)} skipped{result.why_not and f': {result.why_not}'}"
    )
    return result


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
