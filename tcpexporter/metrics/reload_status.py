# SPDX-License-Identifier: GPL-3.0-only
"""Remembers whether the last reload of each configuration file succeeded."""

import time


class Reloads:
    """Result of the last reload of each configuration file."""

    def __init__(self) -> None:
        """Start with success: the files that were read at the start are in force."""
        self.succeeded_s = time.time()
        """When the newest content of all files was last in force, in Unix time (s)."""
        self._failed: set[str] = set()

    @property
    def successful(self) -> bool:
        """Whether the newest content of every file is in force."""
        return not self._failed

    def record(self, about: str, *, successful: bool) -> None:
        """Record the result of a reload.

        Args:
            about: identifies the file.
            successful: whether the new content of the file is in force.
        """
        if successful:
            self._failed.discard(about)
        else:
            self._failed.add(about)
        if not self._failed:
            self.succeeded_s = time.time()
