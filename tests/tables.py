# SPDX-License-Identifier: GPL-3.0-only
"""Formats tables for a terminal and for the generated parts of the documents."""

from pathlib import Path

Table = list[list[str]]
"""Rows of cells; the first row has the headings."""


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


def replaced(document: str, begin: str, end: str, text: str) -> str:
    """Return the document with ``text`` between two markers.

    Raises:
        ValueError: the document does not have the markers.
    """
    before, has_begin, rest = document.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"the document does not have the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def replace(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers in a file.

    Raises:
        ValueError: the file does not have the markers.
    """
    path.write_text(replaced(path.read_text(), begin, end, text))
