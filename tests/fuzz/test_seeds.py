# SPDX-License-Identifier: GPL-3.0-only
"""Runs all fuzz targets in seconds, with all seeds and fixed variations of them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.choices import SEEDS
from tests.fuzz.targets import TARGETS

VARIATIONS = 3001
"""Number of variations. This module makes them, because hypothesis requires ten times as
long."""

FUZZED = [pytest.param(name, run, id=name) for name, run in TARGETS.items()]


def seeds(target: str) -> list[Path]:
    return sorted((SEEDS / target).iterdir())


def varied(seed: bytes, chance: random.Random) -> bytes:
    """Replace, repeat or remove a part of the input."""
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


def test_each_target_has_seeds_and_each_seed_a_target() -> None:
    """Atheris begins with these inputs."""
    assert {each.name for each in SEEDS.iterdir()} == TARGETS.keys()
    assert all(seeds(each) for each in TARGETS)


@pytest.mark.parametrize(("target", "run"), FUZZED)
def test_no_seed_is_a_finding(target: str, run: Callable[[bytes], None]) -> None:
    """Seeds are captured data, odd data, and all previous findings."""
    for seed in seeds(target):
        run(seed.read_bytes())


@pytest.mark.parametrize(("target", "run"), FUZZED)
def test_no_variation_of_a_seed_is_a_finding(
    target: str, run: Callable[[bytes], None]
) -> None:
    """Each of a few thousand variations has up to three changes of a seed."""
    chance = random.Random(target)  # noqa: S311  not a secret
    known = [each.read_bytes() for each in seeds(target)]
    for _ in range(VARIATIONS):
        data = chance.choice(known)
        for _ in range(chance.randint(1, 3)):
            data = varied(data, chance)
        run(data)
