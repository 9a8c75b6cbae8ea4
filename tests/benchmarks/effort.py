# SPDX-License-Identifier: GPL-3.0-only
"""How much of everything is measured: briefly, or with samples enough."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Of one run."""

    sizes: tuple[int, ...]
    """Sockets that are held: both ends of a loopback connection are one each."""
    contender_samples: int
    """Of each contender at each size, at most."""
    contender_s: float
    """Until a contender has had its share of the time at a size."""
    polls: int
    """Scrapes of an exporter that polls, one a second."""
    starts: int
    """Of an exporter, with all connections of a size there already."""
    starts_s: float
    """Until enough time has gone into starts at a size."""
    scrapes: int
    settle_s: float
    """Before nothing happens: longer than --reconcile-interval, so that it has found the
    tracker to be right, and not so long that the server closes an idle connection."""
    idle_s: float
    polling_idle_s: float
    event_rounds: int
    rate_rounds: int
    """Of two pairs each."""
    rate_connections: int
    """By FIN and again by RST, a sample."""
    last_size_after_s: float
    """No further size is begun then, on a machine that is busy with other things."""
    limit_s: int
    """For all of it: it gives up."""


QUICK = Effort(
    sizes=(1_000, 10_000, 100_000),
    contender_samples=21,
    contender_s=0.7,
    polls=2,
    starts=3,
    starts_s=3,
    scrapes=101,
    settle_s=1,
    idle_s=5,
    polling_idle_s=3,
    event_rounds=3,
    rate_rounds=5,
    rate_connections=2_003,
    last_size_after_s=90,
    limit_s=300,
)
FULL = Effort(
    sizes=(1_000, 10_000, 100_000, 1_000_000),
    contender_samples=101,
    contender_s=10,
    polls=7,
    starts=5,
    starts_s=20,
    scrapes=503,
    settle_s=65,
    idle_s=60,
    polling_idle_s=10,
    event_rounds=11,
    rate_rounds=31,
    rate_connections=3_001,
    last_size_after_s=840,
    limit_s=1_800,
)
