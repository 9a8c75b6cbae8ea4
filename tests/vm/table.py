# SPDX-License-Identifier: GPL-3.0-only
"""Writes the table of docs/kernels.md.

python -m tests.vm.table FILE --write docs/kernels.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import tables
from tests.tables import Table
from tests.vm import outcome
from tests.vm.outcome import Outcome

BEGIN = "<!-- kernels: written by python -m tests.vm.table -->"
END = "<!-- end of kernels -->"


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return the headings and a row for each guest."""
    headings = ["kernel", "with", "BCC", "Python", "passed", "failed", "skipped", "seconds"]
    return [[*headings, "the kernel lacks"], *map(_row, outcomes)]


def _row(each: Outcome) -> list[str]:
    guest = each.guest
    return [
        guest.release if guest else each.kernel,
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
        name = f"{each.kernel} with {each.userland}"
        if each.why_not:
            said.append(f"{name}: {each.why_not}")
        said += [f"{name}: {test} failed" for test in each.failed]
        by_reason: dict[str, int] = {}
        for reason in each.skipped.values():
            by_reason[reason] = by_reason.get(reason, 0) + 1
        said += [f"{name}: {number} skipped: {why}" for why, number in by_reason.items()]
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
    parser.add_argument("file", type=Path, help="written by python -m tests.vm")
    parser.add_argument(
        "--write", type=Path, help="replace the text between the marker lines of this file"
    )
    arguments = parser.parse_args()
    text = markdown(outcome.read(arguments.file))
    if arguments.write:
        tables.replace(arguments.write, BEGIN, END, text)
    else:
        sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
