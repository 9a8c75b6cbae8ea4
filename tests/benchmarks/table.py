# SPDX-License-Identifier: GPL-3.0-only
"""Writes the README's table: ``python -m tests.benchmarks.table FILE``."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import report


def markdown(measured: report.Report) -> str:
    """The table, and below it what it is true of."""
    lines = [_line(report.HEADINGS), "| --- | --- | --- | --- |"]
    lines += [_line(row) for row in report.rows(measured)]
    return "\n".join([*lines, "", report.conditions(measured), ""])


def plain(measured: report.Report) -> str:
    """The same for a terminal, with the spread of the samples."""
    return "\n".join([*_aligned(measured), "", report.conditions(measured), ""])


def _line(row: report.Row) -> str:
    return f"| {' | '.join(row[:-1])} |"


def _aligned(measured: report.Report) -> Iterator[str]:
    table = [report.HEADINGS, *report.rows(measured)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="written by python -m tests.benchmarks")
    sys.stdout.write(markdown(report.read(parser.parse_args().file)))
