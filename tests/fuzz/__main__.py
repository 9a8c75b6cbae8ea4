# SPDX-License-Identifier: GPL-3.0-only
"""Fuzzes each target in its own process, two at a time, and prints a table."""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.fuzz.choices import FOUND
from tests.fuzz.targets import TARGETS
from tests.tables import aligned

AT_ONCE = 2

RUNS_OF_A_PROCESS = 100_000
"""Number of inputs of a process. Atheris never frees the data that it compares, up to 1
KiB for each input."""

COLUMNS = ["target", "inputs", "seconds", "inputs/s", "findings"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument(
        "--runs", type=int, default=1_000_000, help="inputs for each target"
    )
    parser.add_argument(
        "--seconds", type=int, default=3600, help="time limit for each target"
    )
    chosen = parser.parse_args(argv)
    targets = chosen.targets or list(TARGETS)
    if unknown := set(targets) - TARGETS.keys():
        parser.error(f"unknown target: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(AT_ONCE) as at_once:
        rows = list(
            at_once.map(lambda each: _fuzz(each, chosen.runs, chosen.seconds), targets)
        )
    sys.stdout.write(aligned([COLUMNS, *rows]) + "\n")
    found = [row[0] for row in rows if row[-1] != "0"]
    for each in found:
        sys.stdout.write(f"the findings of {each} and its log are in {FOUND / each}\n")
    return 1 if found else 0


def _fuzz(target: str, runs: int, seconds: int) -> list[str]:
    """Fuzz a target up to a number of inputs, a time or a finding; return its table row."""
    (FOUND / target).mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    inputs = took_s = findings = 0
    while inputs < runs and took_s < seconds and not findings:
        more, findings = _engine(
            target, min(runs - inputs, RUNS_OF_A_PROCESS), seconds - took_s
        )
        inputs += more
        took_s = int(time.monotonic() - began_s) + 1
        sys.stderr.write(f"{target}: {inputs:,} inputs, {findings} findings\n")
    rate = inputs / took_s
    return [target, f"{inputs:,}", f"{took_s:,}", f"{rate:,.0f}", str(findings)]


def _engine(target: str, runs: int, seconds: int) -> tuple[int, int]:
    """Run atheris in a process; return the number of inputs and of findings."""
    log = FOUND / target / "log"
    with log.open("wb") as written:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.engine", target, str(runs), str(seconds)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    said = log.read_text(errors="replace")
    executed = re.search(r"^stat::number_of_executed_units: (\d+)$", said, re.MULTILINE)
    # Any other end of the process is a finding too.
    findings = said.count("Test unit written to") or int(ended.returncode != 0)
    return int(executed[1]) if executed else 0, findings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
