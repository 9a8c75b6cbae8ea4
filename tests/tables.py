# SPDX-License-Identifier: GPL-3.0-only
"""Tables of text: for a terminal, and for the README, where none is written by hand."""

from pathlib import Path

Table = list[list[str]]
"""Rows of cells; the first are the headings."""


def markdown(table: Table) -> str:
    headings, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([headings, "|" + " --- |" * len(table[0]), *rows])


def aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in table
    )


def replace(path: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two markers in a file, in place of what is there.

    Raises:
        ValueError: it does not have them.
    """
    before, has_begin, rest = path.read_text().partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"{path} does not have the lines {begin!r} and {end!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
