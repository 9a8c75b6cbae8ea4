# SPDX-License-Identifier: GPL-3.0-only
"""Measures the memory of a process over time, and judges whether it grows."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

BLOCKS = 10
"""Number of parts into which each third of the run is divided."""

LEAST_MIB = 0.25
"""Minimum growth: glibc allocates in steps of 128 KiB, so smaller differences are noise."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process, from /proc/PID/status: proc(5)."""

    own_mib: float
    """Python's objects and memory that malloc keeps (RssAnon)."""
    mapped_mib: float
    """Mapped files and BPF maps (RssFile and RssShmem)."""


def memory_of(process: int) -> Memory:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    kib = {name: int(value) for name, value in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
    return Memory(kib["RssAnon"] / 1024, (kib["RssFile"] + kib["RssShmem"]) / 1024)


@dataclass(frozen=True)
class Growth:
    """The difference between the last and the middle third of a run.

    The first third is ignored, because memory used for the first time is not growth.
    """

    grown_mib: float
    """Difference of the medians of the two thirds."""
    noise_mib: float
    """Largest difference between medians of parts of the middle third."""

    @classmethod
    def of(cls, mib: Sequence[float]) -> Self:
        """Compute the growth from values at equal intervals."""
        third = max(len(mib) // 3, BLOCKS)
        middle, last = mib[-2 * third : -third] or mib, mib[-third:]
        size = max(len(middle) // BLOCKS, 1)
        parts = [
            statistics.median(middle[at : at + size]) for at in range(0, len(middle), size)
        ]
        grown = statistics.median(last) - statistics.median(middle)
        return cls(grown, max(parts) - min(parts))

    @property
    def is_more_than_noise(self) -> bool:
        """Return whether the growth exceeds the noise."""
        return self.grown_mib > max(self.noise_mib, LEAST_MIB)

    def __str__(self) -> str:
        return f"by {self.grown_mib:.2f} MiB, with a noise of {self.noise_mib:.2f} MiB"
