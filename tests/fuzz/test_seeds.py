# SPDX-License-Identifier: GPL-3.0-only
"""Bad input, in seconds: all seeds, and variations of them that are always the same."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.choices import SEEDS
from tests.fuzz.targets import TARGETS

VARIATIONS = 3001
"""Without hypothesis, which takes ten times as long to make them."""

FUZZED = [pytest.param(name, run, id=name) for name, run in TARGETS.items()]


def seeds(target: str) -> list[Path]:
    return sorted((SEEDS / target).iterdir())


def varied(seed: bytes, chance: random.Random) -> bytes:
    """With a part replaced by something, or repeated, or left out."""
    at, size = chance.randint(0, len(seed)), chance.choice([0, 1, 2, 4, 16, 64])
    instead = chance.choice(
        [b"", b"\0", b"\xff" * 4, chance.randbytes(chance.randint(0, 8))]
    )
    return (
        seed[:at]
        + instead
        + seed[at : at + size] * chance.randint(0, 2)
        + seed[at + size :]
    )


def test_there_are_seeds_for_each_target_and_no_others() -> None:
    """Atheris begins with them."""
    assert {each.name for each in SEEDS.iterdir()} == TARGETS.keys()
    assert all(seeds(each) for each in TARGETS)


@pytest.mark.parametrize(("target", "run"), FUZZED)
def test_seeds(target: str, run: Callable[[bytes], None]) -> None:
    """What was captured, what is odd, and all that was ever a finding."""
    for seed in seeds(target):
        run(seed.read_bytes())


@pytest.mark.parametrize(("target", "run"), FUZZED)
def test_variations(target: str, run: Callable[[bytes], None]) -> None:
    """A few thousand, without atheris: up to three changes to a seed."""
    chance = random.Random(target)  # noqa: S311  no secret
    known = [each.read_bytes() for each in seeds(target)]
    for _ in range(VARIATIONS):
        data = chance.choice(known)
        for _ in range(chance.randint(1, 3)):
            data = varied(data, chance)
        run(data)
