# SPDX-License-Identifier: GPL-3.0-only
"""The memory of a process over time, and whether it grows."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

BLOCKS = 10
"""Into so many parts each third of the time is divided."""

LEAST_MIB = 0.25
"""Less than this is not growth: glibc takes memory in steps of 128 KiB."""


@dataclass(frozen=True)
class Memory:
    """What is resident, from /proc/PID/status: proc(5)."""

    own_mib: float
    """Of Python's objects and what malloc keeps (RssAnon)."""
    mapped_mib: float
    """Of files, and of the windows of BPF maps (RssFile and RssShmem)."""


def memory_of(process: int) -> Memory:
    """That of a process now."""
    status = Path(f"/proc/{process}/status").read_text()
    kib = {name: int(value) for name, value in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
    return Memory(kib["RssAnon"] / 1024, (kib["RssFile"] + kib["RssShmem"]) / 1024)


@dataclass(frozen=True)
class Growth:
    """How the last third of a time differs from the middle third.

    The first third is left out: memory that is used for the first time is no growth.
    """

    grown_mib: float
    """Of the medians of the two thirds."""
    noise_mib: float
    """The largest difference of the medians of the parts of the middle third."""

    @classmethod
    def of(cls, mib: Sequence[float]) -> Self:
        """Of values at equal distances in time."""
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
        """Whether the process grows."""
        return self.grown_mib > max(self.noise_mib, LEAST_MIB)

    def __str__(self) -> str:
        return f"by {self.grown_mib:.2f} MiB, with a noise of {self.noise_mib:.2f} MiB"
