# SPDX-License-Identifier: GPL-3.0-only
"""How a soak judges memory: a leak is growth, noise and a first use are not."""

import os
import random

import pytest

from tests.kernel.helpers.memory_growth import Growth, memory_of

SAMPLES = 3593


def noisy(mib: float, chosen: random.Random) -> float:
    return mib + chosen.choice([0, 0, 0, 0.4, 0.7])


@pytest.mark.parametrize("seed", range(7))
def test_a_leak_is_growth(seed: int) -> None:
    """3 MiB in all that time, below the height of single peaks at each third."""
    chosen = random.Random(seed)  # noqa: S311  # it is to be repeated
    leaking = [noisy(30 + 3 * at / SAMPLES, chosen) for at in range(SAMPLES)]
    assert not Growth.of([30.0] * SAMPLES).is_more_than_noise
    assert Growth.of(leaking).grown_mib == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("seed", range(7))
def test_noise_and_a_first_use_are_no_growth(seed: int) -> None:
    """Peaks everywhere, and a step in the first third that stays."""
    chosen = random.Random(seed)  # noqa: S311  # it is to be repeated
    samples = [noisy(30 if at < SAMPLES / 4 else 33, chosen) for at in range(SAMPLES)]
    assert not Growth.of(samples).is_more_than_noise


def test_memory_is_that_of_the_kernels_own_account() -> None:
    """Of this process, which has some of each."""
    memory = memory_of(os.getpid())
    assert memory.own_mib > 1
    assert memory.mapped_mib > 1
