# SPDX-License-Identifier: GPL-3.0-only
"""How much of a heavy test is done, where all of it would take too long."""

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """A share of all operations, from 0 to 1."""

    share: float

    def of(self, number: int) -> int:
        """That share of them, or a little more so that it is a prime number."""
        least = max(2, math.ceil(number * self.share))
        return next(filter(_is_prime, itertools.count(least)))

    def times(self, number: int) -> int:
        """That share of a few, and at least one."""
        return max(1, round(number * self.share))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
