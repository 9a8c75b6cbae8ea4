# SPDX-License-Identifier: GPL-3.0-only
"""Runs the kernel tests in a guest of each kernel; each CPU runs one guest at a time."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.vm import (
    CACHE,
    ROOT,
    VmError,
    debs,
    guest,
    images,
    kernels,
    outcome,
    rootfs,
    table,
)
from tests.vm.architectures import AMD64, ARCHITECTURES, ARM64, Architecture
from tests.vm.images import (
    BOOKWORM,
    BOOKWORM_ARM64,
    TRIXIE,
    TRIXIE_ARM64,
    TRIXIE_SYSTEMD,
    VAGRANT,
    Userland,
)
from tests.vm.kernels import KERNELS, KERNELS_ARM64, PAGES_16K, Kernel, Unpacked
from tests.vm.outcome import Outcome

OUTPUT = ROOT / ".cache" / "vm"

LIMIT_S = 4500
"""Time limit of a guest, which suffices even on a busy machine."""

WHOLE = "tests/kernel"
PARTS = {
    name: f"{WHOLE}/test_{name}.py"
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
}
PART = " ".join(PARTS.values())
"""The tests of what differs most between kernels."""

SHORT_PART = " ".join(PARTS[each] for each in PARTS if each != "owners")
"""The tests of what differs most between architectures: they end in 12 minutes on arm64."""

TEST = """
.venv/bin/python -m tests.vm.facts >/share/facts.json || exit
set -- -m "not any_kernel" --effort 0.05 --timeout 600 --junitxml=/share/results.xml
set -- "$@" --durations=20
.venv/bin/python -m pytest {what} -v --color=no "$@"
"""

SHELL = "TERM=linux exec bash </dev/{console} >/dev/{console} 2>&1"


@dataclass(frozen=True)
class Run:
    """A kernel, and the userland and tests that run with it."""

    kernel: Kernel
    userland: Userland
    tests: str = WHOLE
    title: str = ""
    """A name of these tests, necessary if other tests have the same kernel and userland."""
    init: Path = guest.SESSION
    provide: Callable[[Path], None] | None = None
    """Writes files into a directory, which the guest has as /share."""
    is_extra: bool = False
    """Whether it only runs if its kernel or architecture is named by an option."""

    @property
    def architecture(self) -> Architecture:
        return self.kernel.architecture

    @property
    def what(self) -> str:
        """Return the description of the run without its kernel."""
        return ", ".join(filter(None, [self.userland.name, self.title]))

    @property
    def name(self) -> str:
        return f"{self.kernel.name} {self.architecture.name} with {self.what}"

    @property
    def log(self) -> Path:
        """Return the path of the file for the guest's output."""
        return OUTPUT / f"{self.kernel.cached_as}-{images.slug(self.what)}.log"


NEWEST, *BETWEEN, OLDEST = reversed(KERNELS)

RUNS_ARM64 = (
    Run(KERNELS_ARM64[2], BOOKWORM_ARM64, SHORT_PART),
    Run(KERNELS_ARM64[3], TRIXIE_ARM64, is_extra=True),
    Run(KERNELS_ARM64[1], BOOKWORM_ARM64, PART, is_extra=True),
    Run(KERNELS_ARM64[0], BOOKWORM_ARM64, PART, is_extra=True),
    Run(PAGES_16K, BOOKWORM_ARM64, PART, is_extra=True),
    Run(KERNELS_ARM64[2], BOOKWORM_ARM64, "tests/vm/faults.py", "faults", is_extra=True),
    Run(
        *(KERNELS_ARM64[1], BOOKWORM_ARM64, "tests/vm/cross.py -k package", "package"),
        provide=partial(debs.build_for, ARM64, BOOKWORM_ARM64.suite),
        is_extra=True,
    ),
    Run(
        *(KERNELS_ARM64[1], BOOKWORM_ARM64, "tests/vm/cross.py -k image", "images"),
        provide=partial(rootfs.export, ARM64),
        is_extra=True,
    ),
)

RUNS = (
    Run(NEWEST, TRIXIE),
    # Debian's older release does not have this kernel.
    Run(NEWEST, BOOKWORM, is_extra=True),
    # Other guests have these kernels, too.
    *(Run(each, BOOKWORM, PART, is_extra=True) for each in BETWEEN),
    Run(OLDEST, BOOKWORM),
    *RUNS_ARM64,
    Run(KERNELS[1], VAGRANT, "tests/vm/service.py", init=guest.BOOT),
    Run(
        *(KERNELS[1], VAGRANT, "tests/vm/package.py", "package"),
        init=guest.BOOT,
        provide=partial(debs.build, release="debian12"),
    ),
    Run(
        *(KERNELS[2], TRIXIE_SYSTEMD, "tests/vm/package.py", "package"),
        init=guest.BOOT,
        provide=partial(debs.build, release="debian13"),
        is_extra=True,
    ),
    # The newest of these kernels, and one on which the exporter keeps more privileges.
    *(Run(KERNELS[each], BOOKWORM, "tests/vm/faults.py", "faults") for each in (2, 0)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="", help="run this kernel only, such as 6.12")
    parser.add_argument(
        "--arch",
        choices=[each.name for each in ARCHITECTURES],
        help=f"run this architecture only; with --kernel the default is {AMD64.name}",
    )
    parser.add_argument("--shell", action="store_true", help="open a shell in the guest")
    arguments = parser.parse_args()
    runs = chosen(arguments.kernel, arguments.arch)
    if not runs:
        names = ", ".join(
            dict.fromkeys(each.kernel.name for each in chosen(arch=arguments.arch))
        )
        sys.exit(f"unknown kernel {arguments.kernel!r}: choose one of {names}")
    if os.geteuid() != 0:
        sys.exit("building root images requires root: use sudo")
    CACHE.mkdir(parents=True, exist_ok=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.shell:
            sys.exit(_shell(runs[0]))
        options = [*filter(None, (arguments.kernel, arguments.arch))]
        sys.exit(_test(runs, OUTPUT / f"{'-'.join(options) or 'kernels'}.json"))
    except VmError as error:
        sys.exit(str(error))


def chosen(kernel: str = "", arch: str | None = None) -> list[Run]:
    """Return the runs that the options name.

    Without options, they are a selection that ends within an hour on two CPUs: not those
    that are extra, and the others with `PART` instead of `WHOLE`.
    """
    if kernel or arch:
        return [
            each
            for each in RUNS
            if each.architecture.name == (arch or AMD64.name)
            and each.kernel.name == (kernel or each.kernel.name)
        ]
    return [
        replace(each, tests=PART) if each.tests == WHOLE else each
        for each in RUNS
        if not each.is_extra
    ]


def _shell(run: Run) -> int:
    unpacked, image = kernels.fetch(run.kernel), images.build(run.userland)
    with tempfile.TemporaryDirectory() as share:
        command = SHELL.format(console=run.architecture.console)
        return guest.run(unpacked, image, Path(share), command)


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
    result = Outcome(run.kernel.name, run.architecture.name, run.what)
    try:
        kernel, root = unpacked.result(), image.result()
        _print_line(f"{run.name}: booting {kernel.image.name}")
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            share = Path(directory)
            if run.provide:
                run.provide(share)
            command = TEST.format(what=run.tests)
            code = guest.run(
                kernel, root, share, command, init=run.init, log=run.log, limit_s=LIMIT_S
            )
            result = replace(
                result,
                seconds=time.monotonic() - began_s,
                guest=outcome.read_guest(share / "facts.json"),
                **outcome.count(share / "results.xml"),
            )
        if code and not result.failed:
            result = replace(result, why_not=f"pytest: exit code {code}, see {run.log}")
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
