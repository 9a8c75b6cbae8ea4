# SPDX-License-Identifier: GPL-3.0-only
"""Makes choices from the bytes of an input, so that a few bytes describe a whole
message."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

SEEDS = Path(__file__).parent / "seeds"
FOUND = Path(".cache/fuzz")
"""Directory of the results of a run: new inputs, findings and a log."""

_T = TypeVar("_T")


class Choices:
    """Reads bytes from the start of an input; after its end all bytes are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return this many bytes, or fewer at the end of the input."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def exactly(self, size: int) -> bytes:
        return self.take(size).ljust(size, b"\0")

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")

    def pick(self, options: Sequence[_T]) -> _T:
        return options[self.number() % len(options)]

    def rest(self) -> bytes:
        return self.take(len(self._data))
