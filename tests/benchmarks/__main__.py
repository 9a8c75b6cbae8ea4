# SPDX-License-Identifier: GPL-3.0-only
"""Measures, writes a file, shows a table; QUICK=1 in the environment makes it short."""

import argparse
import datetime as dt
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.benchmarks import machine, table
from tests.benchmarks.figures import filled
from tests.benchmarks.measure import FULL, QUICK, measure
from tests.benchmarks.report import Report
from tests.support import bpf_programs, why_no_bpf

PROGRAM = "on_state_change"
FIGURES = machine.ROOT / ".cache" / "bench" / "figures.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=FIGURES, help="JSON to write (default: %(default)s)"
    )
    path: Path = parser.parse_args().output
    if reason := why_no_bpf():
        sys.exit(f"the benchmarks cannot run: {reason}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    report = _run()
    report.write(path)
    sys.stdout.write(f"\n{table.plain(report)}\nevery sample: {path}\n")


def _run() -> Report:
    effort = QUICK if os.environ.get("QUICK") else FULL
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _give_up)
    signal.alarm(effort.limit_s)
    started, start_s = dt.datetime.now(dt.UTC), time.monotonic()
    others = bpf_programs().count(PROGRAM)
    load_before = os.getloadavg()[0]
    samples = measure(effort)
    return Report(
        date=started.isoformat(timespec="seconds"),
        command=machine.command(),
        took_s=time.monotonic() - start_s,
        machine=machine.machine(),
        kernel=machine.kernel(),
        versions=machine.versions(),
        load_average=(load_before, os.getloadavg()[0]),
        other_exporters=others,
        tracked=samples.tracked,
        idle_reconciliations=samples.idle_reconciliations,
        state_changes=samples.state_changes,
        figures=filled(samples.by_figure),
    )


def _give_up(number: int, _frame: FrameType | None) -> None:
    """As an exception, so that everything is cleaned up on the way out."""
    sys.exit(f"given up: {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
