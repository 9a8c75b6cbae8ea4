# SPDX-License-Identifier: GPL-3.0-only
"""The cases of tcpexporter/connections/memory_order.py, in all orders of loads and stores.

Each case is tried as it is, and must have no fault on any machine. It is also tried without
what orders it: then it must have a fault, or the model would prove nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.unit.ordering.machine import (
    Add,
    Await,
    Barrier,
    Memory,
    Operation,
    Read,
    Result,
    Thread,
    Values,
    Write,
    explore,
    lock,
    unlock,
    wait_for_runs,
)

SEQUENTIAL, X86_64, ARM64 = Memory

Operations = list[Operation]

NOTHING: Operations = []
EXCHANGE: Operations = [Barrier()]
ONE_POP: Operations = [lock("stack"), unlock("stack")]
TWO_POPS: Operations = [*ONE_POP, *ONE_POP]
"""``order_stores`` in bpf/tcp_tracker.c, and what would not suffice."""

ONE_LOCK: Operations = [lock("python"), unlock("python")]
BARRIER: Operations = [*ONE_LOCK, *ONE_LOCK]
"""`memory_barrier`, and what would not suffice."""

CLOSED = 9
"""The word of a closed connection; 1 and 2 are those of the first and second connection."""


@dataclass(frozen=True)
class Case:
    name: str
    threads: list[Thread]
    is_fault: Callable[[Result], bool]
    initially: dict[str, int] = field(default_factory=dict)
    faulty: tuple[Memory, ...] = ()
    """The machines on which it has a fault."""


def run(*operations: Operation) -> Thread:
    return Thread(operations, is_run=True)


def thread(*operations: Operation) -> Thread:
    return Thread(operations)


def released(location: str, value: int = 1) -> Write:
    """Hand over, as a lock does that one releases and another acquires."""
    return Write(location, value, is_release=True)


def awaited(location: str, value: int = 1) -> Await:
    return Await(location, value, is_acquire=True)


def reader(barrier: Operations) -> Thread:
    """Do as `consistent_fields`: read the word, two fields, and the word again."""
    return thread(
        Read("before", "word"),
        *barrier,
        Read("key_read", "key"),
        Read("client_read", "client"),
        *barrier,
        Read("after", "word"),
    )


def record(number: int) -> Operations:
    return [Write("key", number), Write("client", number)]


def is_mixed(result: Result) -> bool:
    """Return whether a word was read with fields of another connection."""
    word = result["before"]
    is_open = word == result["after"] and word not in {0, CLOSED}
    return is_open and not (result["key_read"] == result["client_read"] == word)


FIRST = {"word": 1, "key": 1, "client": 1}
"""A slot with the first connection."""


def reopening(order: Operations, barrier: Operations) -> list[Thread]:
    """A run closes a connection; then one opens another in its slot."""
    return [
        run(Write("word", CLOSED), released("socket")),
        run(awaited("socket"), *record(2), *order, Write("word", 2)),
        reader(barrier),
    ]


def replacing(before: Operations, order: Operations, barrier: Operations) -> list[Thread]:
    """A run opens a connection in the slot of one whose closing was missed."""
    return [
        run(Write("word", CLOSED), *before, *record(2), *order, Write("word", 2)),
        reader(barrier),
    ]


def on_one_cpu(order: Operations, barrier: Operations) -> list[Thread]:
    """As `reopening`, but the same CPU releases the lock and acquires it."""
    return [
        thread(
            lock("socket"),
            Write("word", CLOSED),
            unlock("socket"),
            lock("socket"),
            *record(2),
            *order,
            Write("word", 2),
        ),
        reader(barrier),
    ]


def freeing(order: Operations, barrier: Operations) -> list[Thread]:
    """Userspace frees the slot of a connection; a run allocates it for another one."""
    return [
        thread(
            Write("word", CLOSED),
            Write("handle", 0),
            lock("l"),
            Write("free", 1),
            unlock("l"),
        ),
        run(
            lock("l"),
            Read("popped", "free"),
            unlock("l"),
            *(
                Write(
                    each,
                    2,
                    only_if=lambda values: bool(values["popped"]),
                    decides=("popped",),
                )
                for each in ("key", "client")
            ),
            *order,
            Write(
                "word",
                2,
                only_if=lambda values: bool(values["popped"]),
                decides=("popped",),
            ),
        ),
        reader(barrier),
    ]


def seeding(barrier: Operations) -> list[Thread]:
    """Userspace adds a seed: record, entry of the map, word."""
    return [
        thread(
            *record(2),
            lock("bucket"),
            Write("entry", 1, is_release=True),
            unlock("bucket"),
            *barrier,
            Write("word", 2),
        ),
        reader(BARRIER),
    ]


def old_layout(order: Operations, barrier: Operations) -> list[Thread]:
    """The layout before: time and group were two words, and the group was written last."""
    return [
        run(Write("group", 0), released("socket")),
        run(awaited("socket"), Write("time", 2), *order, Write("group", 2)),
        thread(
            Read("before", "group"),
            *barrier,
            Read("time_read", "time"),
            *barrier,
            Read("after", "group"),
        ),
    ]


def has_old_time(result: Result) -> bool:
    return result["before"] == result["after"] == 2 and result["time_read"] == 1


def at(name: str, prefix: str) -> Callable[[Values], str]:
    """Return where an element of an array is whose index a read has found."""
    return lambda values: f"{prefix}{values[name]}"


def finding(stack: str = "l") -> list[Thread]:
    """Slot 2 had the handle 7. Userspace clears and frees it; a run gives it to the handle
    8, and reuses the entry in which the run for the handle 7 has found slot 1."""
    return [
        thread(Write("handle2", 0), lock("l"), Write("free", 1), unlock("l")),
        run(
            lock(stack),
            Read("popped", "free"),
            unlock(stack),
            Write(
                "entry",
                2,
                only_if=lambda values: bool(values["popped"]),
                decides=("popped",),
            ),
            Write(
                "handle2",
                8,
                only_if=lambda values: bool(values["popped"]),
                decides=("popped",),
            ),
        ),
        run(
            Read("slot", "entry"),
            Read("handle", at("slot", "handle"), needs=("slot",)),
        ),
    ]


def finding_by_two_loads() -> list[Thread]:
    """As `finding`, but the run loads the slot again, for the word."""
    freeing, reusing, _ = finding()
    load = Read("handle", at("slot", "handle"), needs=("slot",))
    return [freeing, reusing, run(Read("slot", "entry"), load, Read("again", "entry"))]


HANDLES = {"entry": 1, "handle1": 7, "handle2": 7, "free": 0}


def numbering(*, depends: bool, publishes: bool) -> list[Thread]:
    """Number 2 was that of series 7. Userspace clears and frees it; a run gives it to the
    series 8. A run for series 8 finds it in the map."""
    has_popped = {"only_if": lambda values: bool(values["popped"]), "decides": ("popped",)}
    return [
        thread(Write("series2", 0), lock("l"), Write("free", 1), unlock("l")),
        run(
            lock("l"),
            Read("popped", "free"),
            unlock("l"),
            Write("series2", 8, **has_popped),  # type: ignore[arg-type]
            Write("map", 2, is_release=publishes, **has_popped),  # type: ignore[arg-type]
        ),
        run(
            Read("number", "map"),
            Read(
                "series",
                at("number", "series"),
                needs=("number",),
            )
            if depends
            else Read("series", "series2"),
        ),
    ]


NUMBERS = {"map": 1, "series1": 9, "series2": 7, "free": 0}


def ledger_after_word(order: Operations, barrier: Operations) -> list[Thread]:
    """A run gives a number to a series; another run opens a connection with it."""
    return [
        run(Write("series", 8), released("map")),
        run(
            Read("found", "map"),
            *order,
            Write(
                "word", 2, only_if=lambda values: bool(values["found"]), decides=("found",)
            ),
        ),
        thread(Read("word_read", "word"), *barrier, Read("series_read", "series")),
    ]


def reuse_of_a_number(order: Operations, barrier: Operations) -> list[Thread]:
    """A number with a connection of series 1 is freed, and given to series 2."""
    return [
        run(Write("word1", 0), released("closed")),
        thread(
            awaited("closed"),
            *wait_for_runs(),
            Write("series", 0),
            released("free"),
        ),
        run(awaited("free"), Write("series", 2), *order, Write("word2", 1)),
        thread(
            Read("series_before", "series"),
            *barrier,
            Read("one", "word1"),
            Read("two", "word2"),
            *barrier,
            Read("series_after", "series"),
        ),
    ]


def is_counted_in_another_series(result: Result) -> bool:
    before, after = result["series_before"], result["series_after"]
    if before and before != after:
        return False  # the count is discarded
    return (after != 1 and bool(result["one"])) or (after != 2 and bool(result["two"]))


def closings_log(waits: Operations) -> list[Thread]:
    """A run records a closing and seeks the seed; userspace adds the seed and reads the
    log, without a lock while the bucket is empty."""
    return [
        run(
            lock("bucket"),
            Write("log", 1),
            unlock("bucket"),
            Read("seed_found", "word"),
        ),
        thread(Write("word", 1), *waits, Read("log_read", "log")),
    ]


def recording(waits: Operations) -> list[Thread]:
    """Userspace sets the flag, then dumps the tables, then reads the log."""
    return [
        run(
            Read("is_recording", "flag"),
            Write(
                "log",
                1,
                only_if=lambda values: bool(values["is_recording"]),
                decides=("is_recording",),
            ),
            released("closed_in_tables"),
        ),
        thread(
            Write("flag", 1),
            *waits,
            Read("closed_in_dump", "closed_in_tables"),
            *wait_for_runs(),
            Read("log_read", "log"),
        ),
    ]


def stays_as_a_seed(result: Result) -> bool:
    """Return whether the dump has a connection whose closing is not in the log, and is
    over, so that it will never be."""
    return not result["closed_in_dump"] and not result["is_recording"]


def releasing(waits: Operations) -> list[Thread]:
    """Userspace deletes the handle of a slot and frees the slot, unless it has changed."""
    return [
        run(
            Read("found", "entry"),
            Write(
                "word", 2, only_if=lambda values: bool(values["found"]), decides=("found",)
            ),
        ),
        thread(Write("entry", 0), *waits, Read("word_read", "word")),
    ]


def counting_a_freed_number(again: Operations) -> list[Thread]:
    """A closing run stores the word, then adds to the counter, which userspace moves."""
    return [
        run(Write("word", CLOSED), Add("closed", 1)),
        thread(
            *wait_for_runs(), Read("word_read", "word"), *again, Read("moved", "closed")
        ),
    ]


def dumping(barrier: Operations) -> list[Thread]:
    """The program stores the word before the kernel stores the state."""
    return [
        run(Write("word", 1), released("state")),
        thread(Read("dumped", "state"), *barrier, Read("word_read", "word")),
    ]


def counters() -> list[Thread]:
    return [
        run(Add("counter", 1)),
        run(Add("counter", 1)),
        thread(Read("first", "counter"), Read("second", "counter")),
    ]


def word_alone() -> list[Thread]:
    return [
        run(Write("word", CLOSED), released("socket")),
        run(awaited("socket"), Write("word", 2)),
        thread(Read("first", "word"), Read("second", "word")),
    ]


WEAK = (ARM64,)

CASES = [
    Case(
        "1 word alone",
        word_alone(),
        lambda result: (
            (result["first"], result["second"])
            not in {(1, 1), (1, CLOSED), (1, 2), (CLOSED, CLOSED), (CLOSED, 2), (2, 2)}
        ),
        FIRST,
    ),
    Case("2 exchange", reopening(EXCHANGE, BARRIER), is_mixed, FIRST),
    Case("2 two pops", reopening(TWO_POPS, BARRIER), is_mixed, FIRST),
    Case("2 two pops, one CPU", on_one_cpu(TWO_POPS, BARRIER), is_mixed, FIRST),
    Case("2 exchange, one CPU", on_one_cpu(EXCHANGE, BARRIER), is_mixed, FIRST),
    Case("2 plain stores", reopening(NOTHING, BARRIER), is_mixed, FIRST, WEAK),
    Case("2 one pop", reopening(ONE_POP, BARRIER), is_mixed, FIRST, WEAK),
    Case("2 plain loads", reopening(EXCHANGE, NOTHING), is_mixed, FIRST, WEAK),
    Case("2 one lock", reopening(EXCHANGE, ONE_LOCK), is_mixed, FIRST, WEAK),
    Case("2 plain, all", reopening(NOTHING, NOTHING), is_mixed, FIRST, WEAK),
    Case("3 exchange", replacing(EXCHANGE, EXCHANGE, BARRIER), is_mixed, FIRST),
    Case("3 two pops", replacing(TWO_POPS, TWO_POPS, BARRIER), is_mixed, FIRST),
    Case("3 last store", replacing(NOTHING, EXCHANGE, BARRIER), is_mixed, FIRST, WEAK),
    Case("3 one pop", replacing(ONE_POP, EXCHANGE, BARRIER), is_mixed, FIRST, WEAK),
    Case("4 exchange", freeing(EXCHANGE, BARRIER), is_mixed, {**FIRST, "free": 0}),
    Case("4 two pops", freeing(TWO_POPS, BARRIER), is_mixed, {**FIRST, "free": 0}),
    Case("4 plain", freeing(NOTHING, BARRIER), is_mixed, {**FIRST, "free": 0}, WEAK),
    Case("5", seeding(BARRIER), is_mixed),
    Case("5 no barrier", seeding(NOTHING), is_mixed, {}, WEAK),
    Case(
        "6",
        finding(),
        lambda result: result["slot"] == 2 and result["handle"] == 7,
        HANDLES,
    ),
    Case(
        "6 different locks",
        finding("another"),
        lambda result: result["slot"] == 2 and result["handle"] == 7,
        HANDLES,
        WEAK,
    ),
    Case(
        "6 two loads",
        finding_by_two_loads(),
        lambda result: result["handle"] == 7 and result["slot"] != result["again"],
        HANDLES,
        tuple(Memory),
    ),
    Case(
        "7 published",
        numbering(depends=True, publishes=True),
        lambda result: result["number"] == 2 and result["series"] != 8,
        NUMBERS,
    ),
    Case(
        "7 in a reused entry",
        numbering(depends=True, publishes=False),
        lambda result: result["number"] == 2 and result["series"] == 7,
        NUMBERS,
    ),
    Case(
        "7 in a reused entry, not yet stored",
        numbering(depends=True, publishes=False),
        lambda result: result["number"] == 2 and result["series"] == 0,
        NUMBERS,
        WEAK,
    ),
    Case(
        "7 no dependency",
        numbering(depends=False, publishes=True),
        lambda result: result["number"] == 2 and result["series"] != 8,
        NUMBERS,
        WEAK,
    ),
    *(
        Case(
            f"8 {name}",
            ledger_after_word(order, barrier),
            lambda result: result["word_read"] == 2 and result["series_read"] != 8,
            faulty=faulty,
        )
        for name, order, barrier, faulty in (
            ("exchange", EXCHANGE, BARRIER, ()),
            ("two pops", TWO_POPS, BARRIER, ()),
            ("plain loads", EXCHANGE, NOTHING, WEAK),
            ("one lock", EXCHANGE, ONE_LOCK, WEAK),
        )
    ),
    *(
        Case(
            f"9 {name}",
            reuse_of_a_number(order, barrier),
            is_counted_in_another_series,
            {"series": 1, "word1": 1},
            faulty,
        )
        for name, order, barrier, faulty in (
            ("exchange", EXCHANGE, BARRIER, ()),
            ("two pops", TWO_POPS, BARRIER, ()),
            ("plain stores", NOTHING, BARRIER, WEAK),
            ("plain loads", EXCHANGE, NOTHING, WEAK),
        )
    ),
    *(
        Case(
            f"10 {name}",
            closings_log(waits),
            lambda result: not result["seed_found"] and not result["log_read"],
            faulty=faulty,
        )
        for name, waits, faulty in (
            ("", wait_for_runs(), ()),
            ("no wait", NOTHING, (X86_64, ARM64)),
            ("barrier", EXCHANGE, (X86_64, ARM64)),
        )
    ),
    Case("11", recording(wait_for_runs()), stays_as_a_seed),
    Case("11 no wait", recording(EXCHANGE), stays_as_a_seed, {}, tuple(Memory)),
    *(
        Case(
            f"12 {name}",
            releasing(waits),
            lambda result: result["word_read"] == 1 and result["word"] == 2,
            {"entry": 1, "word": 1},
            faulty,
        )
        for name, waits, faulty in (
            ("", wait_for_runs(), ()),
            ("no wait", EXCHANGE, tuple(Memory)),
        )
    ),
    *(
        Case(
            f"12 counters {name}",
            counting_a_freed_number(again),
            lambda result: result["word_read"] == CLOSED and not result["moved"],
            {"word": 1},
            faulty,
        )
        for name, again, faulty in (
            ("", wait_for_runs(), ()),
            ("no second wait", EXCHANGE, tuple(Memory)),
        )
    ),
    *(
        Case(
            f"13 {name}",
            dumping(barrier),
            lambda result: bool(result["dumped"]) and not result["word_read"],
            faulty=faulty,
        )
        for name, barrier, faulty in (("", BARRIER, ()), ("no barrier", NOTHING, WEAK))
    ),
    Case(
        "14",
        counters(),
        lambda result: result["first"] > result["second"] or result["counter"] != 2,
    ),
    Case(
        "15 version 1 of the layout, with all barriers",
        old_layout(EXCHANGE, BARRIER),
        has_old_time,
        {"time": 1, "group": 1},
    ),
    Case(
        "15 version 1 of the layout",
        old_layout(NOTHING, NOTHING),
        has_old_time,
        {"time": 1, "group": 1},
        WEAK,
    ),
    Case(
        "15 version 1 of the layout, barriers of the reader alone",
        old_layout(NOTHING, BARRIER),
        has_old_time,
        {"time": 1, "group": 1},
        WEAK,
    ),
]


@pytest.mark.parametrize("memory", Memory, ids=lambda each: each.name)
@pytest.mark.parametrize("case", CASES, ids=lambda each: each.name)
def test_a_case_has_a_fault_only_where_nothing_orders_it(
    case: Case, memory: Memory
) -> None:
    explored = explore(case.threads, memory, case.initially)
    assert explored.results
    assert bool(explored.having(case.is_fault)) is (memory in case.faulty)
