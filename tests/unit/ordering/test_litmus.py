# SPDX-License-Identifier: GPL-3.0-only
"""The model checker gives the published results of litmus tests.

Names and results are those of J. Alglave, L. Maranget, M. Tautschnig, "Herding Cats"
(2014), for x86-TSO, and of C. Pulte et al., "Simplifying ARM Concurrency" (2018).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.unit.ordering.machine import (
    Add,
    Barrier,
    Memory,
    Operation,
    Read,
    Result,
    Thread,
    Write,
    explore,
    lock,
    unlock,
    wait_for_runs,
)

SEQUENTIAL, X86_64, ARM64 = Memory


@dataclass(frozen=True)
class Litmus:
    name: str
    threads: list[list[Operation]]
    is_weak: Callable[[Result], bool]
    """Whether a result is the one that program order excludes."""
    allowed: tuple[Memory, ...] = ()


def order() -> list[Operation]:
    """Release a lock, and acquire one: what orders in Python, and in two pops."""
    return [lock("l"), unlock("l"), lock("l"), unlock("l")]


def always(_values: object) -> bool:
    return True


def x(_values: object) -> str:
    return "x"


def mp(*between: Operation, first: Write, then: list[Operation]) -> list[list[Operation]]:
    return [[Write("x", 1), *between, first], then]


def new_then_old(result: Result) -> bool:
    return result["a"] == 1 and result["b"] == 0


def both_old(result: Result) -> bool:
    return result["a"] == result["b"] == 0


def both_new(result: Result) -> bool:
    return result["a"] == result["b"] == 1


Y = Write("y", 1)
X_TO_B = Read("b", "x")
Y_TO_A = Read("a", "y")
B = Barrier()


def sb(between: list[Operation], *, acquire: bool = False) -> list[list[Operation]]:
    return [
        [Write("x", 1, is_release=acquire), *between, Read("a", "y", is_acquire=acquire)],
        [Write("y", 1, is_release=acquire), *between, Read("b", "x", is_acquire=acquire)],
    ]


def lb(*, data: bool = False, control: bool = False) -> list[list[Operation]]:
    def write(location: str, read: str) -> Write:
        return Write(
            location,
            (lambda values: (values[read] and 1) or 1) if data else 1,
            needs=(read,) if data else (),
            only_if=always if control else None,
            decides=(read,) if control else (),
        )

    return [[Read("a", "x"), write("y", "a")], [Read("b", "y"), write("x", "b")]]


def iriw(*, address: bool) -> list[list[Operation]]:
    def reader(first: str, second: str, one: str, other: str) -> list[Operation]:
        where = (lambda _values: second) if address else second
        return [Read(one, first), Read(other, where, needs=(one,) if address else ())]

    return [
        [Write("x", 1)],
        [Write("y", 1)],
        reader("x", "y", "a", "b"),
        reader("y", "x", "c", "d"),
    ]


LITMUS = [
    Litmus("MP", mp(first=Y, then=[Y_TO_A, X_TO_B]), new_then_old, (ARM64,)),
    Litmus("MP+dmb+po", mp(B, first=Y, then=[Y_TO_A, X_TO_B]), new_then_old, (ARM64,)),
    Litmus("MP+po+dmb", mp(first=Y, then=[Y_TO_A, B, X_TO_B]), new_then_old, (ARM64,)),
    Litmus("MP+dmbs", mp(B, first=Y, then=[Y_TO_A, B, X_TO_B]), new_then_old),
    Litmus(
        "MP+dmb+addr",
        mp(B, first=Y, then=[Y_TO_A, Read("b", x, needs=("a",))]),
        new_then_old,
    ),
    Litmus(
        "MP+dmb+ctrl",
        mp(B, first=Y, then=[Y_TO_A, Read("b", "x", only_if=always, decides=("a",))]),
        new_then_old,
        (ARM64,),
    ),
    Litmus(
        "MP+rel+acq",
        mp(
            first=Write("y", 1, is_release=True),
            then=[Read("a", "y", is_acquire=True), X_TO_B],
        ),
        new_then_old,
    ),
    Litmus(
        "MP+rel+po",
        mp(first=Write("y", 1, is_release=True), then=[Y_TO_A, X_TO_B]),
        new_then_old,
        (ARM64,),
    ),
    Litmus(
        "MP+lock-unlock+dmb",
        mp(lock("l"), unlock("l"), first=Y, then=[Y_TO_A, B, X_TO_B]),
        new_then_old,
        (ARM64,),
    ),
    Litmus(
        "MP+unlock-lock+dmb", mp(*order(), first=Y, then=[Y_TO_A, B, X_TO_B]), new_then_old
    ),
    Litmus(
        "MP+dmb+lock-unlock",
        mp(B, first=Y, then=[Y_TO_A, lock("l"), unlock("l"), X_TO_B]),
        new_then_old,
        (ARM64,),
    ),
    Litmus(
        "MP+dmb+unlock-lock", mp(B, first=Y, then=[Y_TO_A, *order(), X_TO_B]), new_then_old
    ),
    Litmus(
        "MP+dmb+[rfi-ctrl]-addr (PPOCA)",
        mp(
            B,
            first=Y,
            then=[
                Y_TO_A,
                Write("z", 1, only_if=always, decides=("a",)),
                Read("c", "z"),
                Read("b", x, needs=("c",)),
            ],
        ),
        new_then_old,
        (ARM64,),
    ),
    Litmus("SB", sb([]), both_old, (X86_64, ARM64)),
    Litmus("SB+dmbs", sb([B]), both_old),
    Litmus("SB+rel-acq", sb([], acquire=True), both_old, (X86_64,)),
    Litmus("SB+unlock-locks", sb(order()), both_old),
    Litmus(
        "SB+rfis",
        [
            [Write("x", 1), Read("c", "x"), Read("a", "y", needs=("c",))],
            [Write("y", 1), Read("d", "y"), Read("b", "x", needs=("d",))],
        ],
        both_old,
        (X86_64, ARM64),
    ),
    Litmus("LB", lb(), both_new, (ARM64,)),
    Litmus("LB+datas", lb(data=True), both_new),
    Litmus("LB+ctrls", lb(control=True), both_new),
    Litmus(
        "S",
        [[Write("x", 2), Write("y", 1)], [Y_TO_A, Write("x", 1)]],
        lambda result: result["a"] == 1 and result["x"] == 2,
        (ARM64,),
    ),
    Litmus(
        "R",
        [[Write("x", 1), Write("y", 1)], [Write("y", 2), Read("a", "x")]],
        lambda result: result["y"] == 2 and result["a"] == 0,
        (X86_64, ARM64),
    ),
    Litmus(
        "2+2W",
        [[Write("x", 1), Write("y", 2)], [Write("y", 1), Write("x", 2)]],
        lambda result: result["x"] == result["y"] == 1,
        (ARM64,),
    ),
    Litmus(
        "WRC+data+addr",
        [
            [Write("x", 1)],
            [Read("c", "x"), Write("y", lambda values: values["c"], needs=("c",))],
            [Y_TO_A, Read("b", x, needs=("a",))],
        ],
        lambda result: result["c"] == 1 and new_then_old(result),
    ),
    Litmus(
        "IRIW",
        iriw(address=False),
        lambda result: (result["a"], result["b"], result["c"], result["d"]) == (1, 0, 1, 0),
        (ARM64,),
    ),
    Litmus(
        "IRIW+addrs",
        iriw(address=True),
        lambda result: (result["a"], result["b"], result["c"], result["d"]) == (1, 0, 1, 0),
    ),
    Litmus(
        "CoRR",
        [[Write("x", 1)], [Read("a", "x"), Read("b", "x")]],
        new_then_old,
    ),
    Litmus("CoWW", [[Write("x", 2), Write("x", 1)]], lambda result: result["x"] == 2),
    Litmus(
        "CoWR",
        [[Write("x", 1), Read("a", "x")], [Write("x", 2)]],
        lambda result: result["a"] == 0,
    ),
    Litmus(
        "CoRW",
        [[Read("a", "x"), Write("x", 1)], [Write("x", 2)]],
        lambda result: result["a"] == 1,
    ),
    Litmus(
        "RSW",
        mp(
            B,
            first=Y,
            then=[
                Y_TO_A,
                Read("c", lambda _values: "z", needs=("a",)),
                Read("d", "z"),
                Read("b", x, needs=("d",)),
            ],
        ),
        new_then_old,
        (ARM64,),
    ),
    Litmus(
        "atomic adds",
        [[Add("x", 1)], [Add("x", 1)]],
        lambda result: result["x"] != 2,
    ),
    Litmus(
        "mutual exclusion",
        [
            [lock("l"), Write("x", 1), Write("y", 1), unlock("l")],
            [lock("l"), Read("a", "y"), Read("b", "x"), unlock("l")],
        ],
        lambda result: result["a"] != result["b"],
    ),
]


@pytest.mark.parametrize("memory", Memory, ids=lambda each: each.name)
@pytest.mark.parametrize("litmus", LITMUS, ids=lambda each: each.name)
def test_a_litmus_test_has_its_published_result(litmus: Litmus, memory: Memory) -> None:
    threads = [Thread(each) for each in litmus.threads]
    explored = explore(threads, memory, {"x": 0, "y": 0, "z": 0})
    assert explored.results
    assert bool(explored.having(litmus.is_weak)) is (memory in litmus.allowed)


@pytest.mark.parametrize("memory", Memory, ids=lambda each: each.name)
def test_rcu_orders_a_writer_that_waits_with_runs_that_do_not(memory: Memory) -> None:
    """SB and MP+sync+rcu, as in the kernel's tools/memory-model: forbidden."""
    sb_run = Thread([Write("y", 1), Read("b", "x")], is_run=True)
    waiter = Thread([Write("x", 1), *wait_for_runs(), Read("a", "y")])
    assert not explore([waiter, sb_run], memory).having(both_old)
    mp_run = Thread([Read("a", "y"), Read("b", "x")], is_run=True)
    waiter = Thread([Write("x", 1), *wait_for_runs(), Write("y", 1)])
    assert not explore([waiter, mp_run], memory).having(new_then_old)
