# SPDX-License-Identifier: GPL-3.0-only
"""A case of tcpexporter/connections/memory_order.py, for the model checker."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.unit.ordering.machine import (
    Await,
    Barrier,
    Memory,
    Operation,
    Result,
    Thread,
    Write,
    explore,
    lock,
    unlock,
)

Operations = list[Operation]

NOTHING: Operations = []
EXCHANGE: Operations = [Barrier()]
ONE_POP: Operations = [lock("stack"), unlock("stack")]
TWO_POPS: Operations = [*ONE_POP, *ONE_POP]
"""``order_stores`` in bpf/tcp_tracker.c, and what would not suffice."""

ONE_LOCK: Operations = [lock("python"), unlock("python")]
BARRIER: Operations = [*ONE_LOCK, *ONE_LOCK]
"""`memory_barrier`, and what would not suffice."""

WEAK = (Memory.ARM64,)


@dataclass(frozen=True)
class Case:
    name: str
    threads: list[Thread]
    is_fault: Callable[[Result], bool]
    initially: dict[str, int] = field(default_factory=dict)
    faulty: tuple[Memory, ...] = ()
    """The machines on which it has a fault."""

    def check(self, memory: Memory) -> None:
        """Check that it has a fault on this machine if and only if it must have one."""
        explored = explore(self.threads, memory, self.initially)
        assert explored.results
        assert bool(explored.having(self.is_fault)) is (memory in self.faulty)


def run(*operations: Operation) -> Thread:
    return Thread(operations, is_run=True)


def thread(*operations: Operation) -> Thread:
    return Thread(operations)


def released(location: str, value: int = 1) -> Write:
    """Hand over, as a lock does that one releases and another acquires."""
    return Write(location, value, is_release=True)


def awaited(location: str, value: int = 1) -> Await:
    return Await(location, value, is_acquire=True)


def if_found(read: str, write: Write) -> Write:
    """Write only if a read has found something."""
    return replace(write, only_if=lambda values: bool(values[read]), decides=(read,))
