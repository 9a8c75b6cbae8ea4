# SPDX-License-Identifier: GPL-3.0-only
"""The sizes, numbers of samples and time limits of a run: a quick and a full plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The sizes, numbers of samples and time limits of one run."""

    sizes: tuple[int, ...]
    """Numbers of held sockets to measure with; a loopback connection has two sockets."""
    contender_samples: int
    """Maximum number of samples of each method at each size."""
    contender_s: float
    """Time after which a method gets no further sample at a size."""
    polls: int
    """Scrapes of an exporter that polls; one scrape a second."""
    starts: int
    """Maximum number of starts with all connections of a size already open."""
    starts_s: float
    """Time after which there is no further start at a size, first or adopting."""
    adoptions: int
    """Maximum number of starts that adopt the pinned state of the previous exporter."""
    scrapes: int
    settle_s: float
    """Pause before idle CPU time is measured. It is longer than --reconcile-interval, so
    that reconciliation has ended, and shorter than the server's limit for idle
    connections."""
    idle_s: float
    polling_idle_s: float
    event_rounds: int
    rate_rounds: int
    """Rounds that compare rates; each round has two pairs of rates."""
    rate_batches: int
    """Number of batches in each sample that are closed by FIN; as many are closed by
    RST."""
    last_size_after_s: float
    """Time after which no larger size is begun. It is exceeded only on a busy machine."""
    limit_s: int
    """Time limit for the whole run, which then stops."""


QUICK = Plan(
    sizes=(1_000, 10_000, 100_000),
    contender_samples=21,
    contender_s=0.5,
    polls=2,
    starts=2,
    starts_s=3,
    adoptions=1,
    scrapes=101,
    settle_s=1,
    idle_s=5,
    polling_idle_s=3,
    event_rounds=3,
    rate_rounds=5,
    rate_batches=21,
    last_size_after_s=90,
    limit_s=300,
)
FULL = Plan(
    sizes=(1_000, 10_000, 100_000, 1_000_000),
    contender_samples=51,
    contender_s=4,
    polls=5,
    starts=3,
    starts_s=30,
    adoptions=5,
    scrapes=307,
    settle_s=65,
    idle_s=30,
    polling_idle_s=10,
    event_rounds=7,
    rate_rounds=33,
    rate_batches=31,
    last_size_after_s=600,
    limit_s=1_500,
)
