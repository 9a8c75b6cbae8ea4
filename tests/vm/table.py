# SPDX-License-Identifier: GPL-3.0-only
"""Writes the table of docs/kernels.md.

python -m tests.vm.table FILE... --write docs/kernels.md
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tests import tables
from tests.tables import Table
from tests.vm import outcome
from tests.vm.outcome import Outcome

BEGIN = "<!-- kernels: written by python -m tests.vm.table -->"
END = "<!-- end of kernels -->"


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return the headings and a row for each guest."""
    headings = ["kernel", "architecture", "with", "BCC", "Python"]
    headings += ["passed", "failed", "skipped", "seconds", "the kernel lacks"]
    return [headings, *map(_row, outcomes)]


def _row(each: Outcome) -> list[str]:
    guest = each.guest
    return [
        guest.release if guest else each.kernel,
        each.architecture,
        each.userland,
        guest.bcc if guest else "",
        guest.python if guest else "",
        f"{each.passed:,}",
        f"{len(each.failed):,}",
        f"{len(each.skipped):,}",
        f"{each.seconds:.0f}",
        ", ".join(guest.lacks) if guest else "",
    ]


def remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence for each failed test, and for each reason of skipped tests."""
    said = []
    for each in outcomes:
        if each.why_not:
            said.append(f"{each.name}: {each.why_not}")
        said += [f"{each.name}: {test} failed" for test in each.failed]
        by_reason: dict[str, int] = {}
        for reason in each.skipped.values():
            by_reason[reason] = by_reason.get(reason, 0) + 1
        said += [
            f"{each.name}: {number} skipped: {why}" for why, number in by_reason.items()
        ]
    bare = [
        each.guest
        for each in outcomes
        if each.guest and not (each.guest.has_headers or each.guest.has_compiler)
    ]
    said.append(f"{len(bare)} of {len(outcomes)} have neither headers nor a compiler")
    return said


def plain(outcomes: Sequence[Outcome]) -> str:
    """Format the table and the remarks for a terminal."""
    return "\n".join([tables.aligned(table(outcomes)), "", *remarks(outcomes)]).strip()


def markdown(outcomes: Sequence[Outcome]) -> str:
    """For docs/kernels.md."""
    lines = [f"- {each}" for each in remarks(outcomes)]
    return "\n\n".join(filter(None, [tables.markdown(table(outcomes)), "\n".join(lines)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        help="written by python -m tests.vm; a guest's last result counts",
    )
    parser.add_argument(
        "--write", type=Path, help="replace the text between the marker lines of this file"
    )
    arguments = parser.parse_args()
    results = chain.from_iterable(map(outcome.read, arguments.files))
    text = markdown([*{each.name: each for each in results}.values()])
    if arguments.write:
        tables.replace(arguments.write, BEGIN, END, text)
    else:
        sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
