# SPDX-License-Identifier: GPL-3.0-only
"""Remembers whether the last reload of each configuration file succeeded."""

import time


class Reloads:
    """What came of reading, the first time and again."""

    def __init__(self) -> None:
        """Begin with what was read at the start, which is in force."""
        self.succeeded_s = time.time()
        """When all that was read was in force last, by the wall clock."""
        self._failed: set[str] = set()

    @property
    def successful(self) -> bool:
        """Whether all that was read last is in force."""
        return not self._failed

    def note(self, about: str, *, successful: bool) -> None:
        """What came of one of the files."""
        if successful:
            self._failed.discard(about)
        else:
            self._failed.add(about)
        if not self._failed:
            self.succeeded_s = time.time()
