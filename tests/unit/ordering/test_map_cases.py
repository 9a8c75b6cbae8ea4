# SPDX-License-Identifier: GPL-3.0-only
"""Cases 6 to 14 and 16 of memory_order.py: maps, ledger, flags, logs, tables, caches.

The checker must find no fault in a case on any machine. Without the barrier that orders the
case, it must find a fault: otherwise the model would prove nothing.
"""

from collections.abc import Callable

import pytest

from tests.unit.ordering.case import (
    BARRIER,
    EXCHANGE,
    NOTHING,
    ONE_LOCK,
    TWO_POPS,
    WEAK,
    Case,
    Operations,
    awaited,
    if_found,
    released,
    run,
    thread,
)
from tests.unit.ordering.machine import (
    Add,
    Memory,
    Read,
    Result,
    Thread,
    Values,
    Write,
    lock,
    unlock,
    wait_for_runs,
)

CLOSED = 9
"""The word of a closed connection; 1 and 2 are those of the first and second connection."""


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
            if_found("popped", Write("entry", 2)),
            if_found("popped", Write("handle2", 8)),
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
    return [
        thread(Write("series2", 0), lock("l"), Write("free", 1), unlock("l")),
        run(
            lock("l"),
            Read("popped", "free"),
            unlock("l"),
            if_found("popped", Write("series2", 8)),
            if_found("popped", Write("map", 2, is_release=publishes)),
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
            if_found("found", Write("word", 2)),
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
            if_found("is_recording", Write("log", 1)),
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
            if_found("found", Write("word", 2)),
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


def caching(turns_off: Operations, waits: Operations) -> list[Thread]:
    """Userspace turns the caches off, deletes a key from the map, and begins epoch 2.

    A run writes to the cache that the key is in the map, with its epoch. Another run uses
    the element if the element has the epoch of this run.
    """
    return [
        run(
            Read("epoch_of_writer", "epoch"),
            Read("in_map", "map"),
            Write(
                "cache",
                lambda values: values["epoch_of_writer"],
                needs=("epoch_of_writer",),
                only_if=lambda values: bool(values["in_map"] and values["epoch_of_writer"]),
                decides=("in_map", "epoch_of_writer"),
            ),
        ),
        run(
            Read("epoch_of_reader", "epoch"),
            Read("cached", "cache"),
            Write(
                "word",
                2,
                only_if=lambda values: 0 != values["epoch_of_reader"] == values["cached"],
                decides=("cached", "epoch_of_reader"),
            ),
        ),
        thread(
            *turns_off,
            Write("map", 0),
            *waits,
            Read("word_read", "word"),
            Write("epoch", 2),
        ),
    ]


OFF: Operations = [Write("epoch", 0)]


def counters() -> list[Thread]:
    return [
        run(Add("counter", 1)),
        run(Add("counter", 1)),
        thread(Read("first", "counter"), Read("second", "counter")),
    ]


CASES = [
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
            ("no wait", NOTHING, (Memory.X86_64, Memory.ARM64)),
            ("barrier", EXCHANGE, (Memory.X86_64, Memory.ARM64)),
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
    *(
        Case(
            f"16 {name}",
            caching(turns_off, waits),
            lambda result: result["word_read"] == 1 and result["word"] == 2,
            {"map": 1, "cache": 1, "epoch": 1, "word": 1},
            faulty,
        )
        for name, turns_off, waits, faulty in (
            ("", OFF, wait_for_runs(), ()),
            ("not turned off", NOTHING, wait_for_runs(), tuple(Memory)),
            ("no wait", OFF, EXCHANGE, tuple(Memory)),
        )
    ),
    Case(
        "14",
        counters(),
        lambda result: result["first"] > result["second"] or result["counter"] != 2,
    ),
]


@pytest.mark.parametrize("memory", Memory, ids=lambda each: each.name)
@pytest.mark.parametrize("case", CASES, ids=lambda each: each.name)
def test_a_case_has_a_fault_only_where_nothing_orders_it(
    case: Case, memory: Memory
) -> None:
    case.check(memory)
