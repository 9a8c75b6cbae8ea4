# SPDX-License-Identifier: GPL-3.0-only
"""The share of a heavy test that the option --effort selects."""

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """A share of the full number of operations, from 0 to 1."""

    share: float

    def of(self, number: int) -> int:
        """Return this share of a number, rounded up to a prime number."""
        least = max(2, math.ceil(number * self.share))
        return next(filter(_is_prime, itertools.count(least)))

    def times(self, number: int) -> int:
        """Return this share of a small number, at least 1."""
        return max(1, round(number * self.share))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
