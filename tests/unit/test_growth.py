# SPDX-License-Identifier: GPL-3.0-only
"""How a soak test judges memory: a leak is growth; noise and a first use are not."""

import os
import random

import pytest

from tests.kernel.helpers.memory_growth import Growth, memory_of

SAMPLES = 3593


def noisy(mib: float, chosen: random.Random) -> float:
    return mib + chosen.choice([0, 0, 0, 0.4, 0.7])


@pytest.mark.parametrize("seed", range(7))
def test_a_leak_is_reported_as_growth(seed: int) -> None:
    """The leak is 3 MiB over the run, which is less than some peaks in each third."""
    chosen = random.Random(seed)  # noqa: S311  # noqa: S311  # repeatable
    leaking = [noisy(30 + 3 * at / SAMPLES, chosen) for at in range(SAMPLES)]
    assert not Growth.of([30.0] * SAMPLES).is_more_than_noise
    assert Growth.of(leaking).grown_mib == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("seed", range(7))
def test_noise_and_a_first_use_are_not_growth(seed: int) -> None:
    """The samples have peaks everywhere, and one lasting step in the first third."""
    chosen = random.Random(seed)  # noqa: S311  # noqa: S311  # repeatable
    samples = [noisy(30 if at < SAMPLES / 4 else 33, chosen) for at in range(SAMPLES)]
    assert not Growth.of(samples).is_more_than_noise


def test_memory_is_read_from_the_kernel() -> None:
    """This process has memory of both kinds."""
    memory = memory_of(os.getpid())
    assert memory.own_mib > 1
    assert memory.mapped_mib > 1
