# SPDX-License-Identifier: GPL-3.0-only
"""A random walk: whatever happens, the exporter says what ss(8) says.

Several processes open and close connections by chance while the exporter is
stopped, killed, paused and started. Whenever they are quiet, its counts must be
those of the oracle: at once if it was told of every event, after one more
reconciliation if the kernel says that events were missed.

TCPEXPORTER_TEST_SEED=N repeats a walk.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.kernel import oracle
from tests.kernel.holding import LISTENING
from tests.kernel.worker import Worker
from tests.support import ESTABLISHED, LONG_TERM, Exporter

OPERATIONS = 211
"""Of each process, between two moments of quiet."""

SETTINGS = ("--source", "ebpf", "--duration", "0", "--reconcile-interval", "1")
SETTINGS += ("--reconcile-cpu", "100")


@pytest.fixture(autouse=True)
def few_ports(netns: str) -> None:
    """Address pairs are used again and again, and a page stays short."""
    oracle.set_inside(netns, "/proc/sys/net/ipv4/ip_local_port_range", "50021 51019")


@pytest.fixture
def seed() -> int:
    """The same in CI each time."""
    default = 1009 if os.environ.get("CI") == "true" else random.randrange(1 << 32)
    return int(os.environ.get("TCPEXPORTER_TEST_SEED", default))


class Walk:
    """Random steps, and what came of them."""

    EVENTS = (
        *["nothing_happens"] * 5,
        *["exporter_is_paused"] * 5,
        *["process_is_killed"] * 3,
        *["exporter_ends"] * 2,
        *["exporter_is_killed"] * 2,
        *["exporter_ends_in_quiet"] * 1,
    )

    def __init__(self, seed: int, direction: str) -> None:
        self._seed = seed
        self._random = random.Random(seed)
        self._direction = direction
        self._workers = []
        self._workers = [
            Worker("tests.kernel.holding", index) for index in range(len(LISTENING))
        ]
        ...
