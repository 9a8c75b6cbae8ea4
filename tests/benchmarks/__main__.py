# SPDX-License-Identifier: GPL-3.0-only
"""Measures the performance of the exporter, writes a JSON file and prints tables. The
environment variable QUICK=1 makes a short run."""

import argparse
import datetime as dt
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.benchmarks import ROOT, machine, picture, table
from tests.benchmarks.figures import filled
from tests.benchmarks.measure import measure
from tests.benchmarks.plan import FULL, QUICK, Plan
from tests.benchmarks.report import Report
from tests.benchmarks.sizes import Size, figure_samples, measure_size
from tests.support import bpf_programs, why_no_bpf

PROGRAM = "on_state_change"
OUTPUT = ROOT / ".cache" / "bench"
"""The default directory of results. A short run has its own file there, so it does not
overwrite the results of a full run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    is_quick = bool(os.environ.get("QUICK"))
    default = OUTPUT / ("quick.json" if is_quick else "figures.json")
    parser.add_argument(
        "--output", type=Path, default=default, help="JSON to write (default: %(default)s)"
    )
    path: Path = parser.parse_args().output
    if reasons := [*filter(None, [why_no_bpf()]), *machine.absent()]:
        sys.exit(f"cannot run the benchmarks: {'; '.join(reasons)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    report = _run(QUICK if is_quick else FULL)
    report.write(path)
    drawn = picture.draw(report.sizes, path.with_suffix(".svg"))
    sys.stdout.write(f"\n{table.plain(report)}\n\nevery sample: {path}\npicture: {drawn}\n")


def _run(plan: Plan) -> Report:
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _give_up)
    signal.alarm(plan.limit_s)
    started, start_s = dt.datetime.now(dt.UTC), time.monotonic()
    others = bpf_programs().count(PROGRAM)
    # read first, because the working tree may change during the run
    versions = machine.versions()
    load_before = os.getloadavg()[0]
    samples = measure(plan)
    sizes = _sizes(plan, start_s)
    return Report(
        date=started.isoformat(timespec="seconds"),
        command=machine.command(),
        took_s=time.monotonic() - start_s,
        machine=machine.machine(),
        kernel=machine.kernel(),
        versions=versions,
        load_average=(load_before, os.getloadavg()[0]),
        other_exporters=others,
        tracked=samples.tracked,
        idle_reconciliations=samples.idle_reconciliations,
        state_changes=samples.state_changes,
        figures=filled({**samples.by_figure, **figure_samples(sizes)}),
        sizes=sizes,
    )


def _sizes(plan: Plan, start_s: float) -> list[Size]:
    """Measure each size, from small to large, because the largest takes longest."""
    sizes = []
    for sockets in plan.sizes:
        if time.monotonic() - start_s > plan.last_size_after_s:
            why_not = f"the smaller sizes already took {time.monotonic() - start_s:.0f} s"
            sizes.append(Size(sockets, why_not=why_not))
        else:
            sizes.append(measure_size(sockets, plan))
    return sizes


def _give_up(number: int, _frame: FrameType | None) -> None:
    """End the run by an exception, so that all contexts clean up."""
    sys.exit(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
