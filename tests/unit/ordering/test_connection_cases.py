# SPDX-License-Identifier: GPL-3.0-only
"""Cases 1 to 5 and 15 of memory_order.py: words, records, clients, seeds, pinned state.

The checker must find no fault in a case on any machine. Without the barrier that orders the
case, it must find a fault: otherwise the model would prove nothing.
"""

import pytest

from tests.unit.ordering.case import (
    BARRIER,
    EXCHANGE,
    NOTHING,
    ONE_LOCK,
    ONE_POP,
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
    Memory,
    Read,
    Result,
    Thread,
    Write,
    lock,
    unlock,
)

CLOSED = 9
"""The word of a closed connection; 1 and 2 are those of the first and second connection."""


def word_alone() -> list[Thread]:
    return [
        run(Write("word", CLOSED), released("socket")),
        run(awaited("socket"), Write("word", 2)),
        thread(Read("first", "word"), Read("second", "word")),
    ]


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
            *(if_found("popped", Write(each, 2)) for each in ("key", "client")),
            *order,
            if_found("popped", Write("word", 2)),
        ),
        reader(barrier),
    ]


def comparing(order: Operations, barrier: Operations) -> list[Thread]:
    """A run opens a connection whose word is equal to that of the last reading.

    The reader compares the word, then the client, with those of the last reading. In the
    model, the new word is 2.
    """
    return [
        run(Write("word", CLOSED), released("socket")),
        run(awaited("socket"), Write("client", 2), *order, Write("word", 2)),
        thread(Read("word_read", "word"), *barrier, Read("client_read", "client")),
    ]


def seems_unchanged(result: Result) -> bool:
    """Return whether the new word was read with the client of the last reading."""
    return result["word_read"] == 2 and result["client_read"] == 1


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
    Case("2 comparison", comparing(EXCHANGE, BARRIER), seems_unchanged, FIRST),
    Case(
        "2 comparison, plain loads",
        comparing(EXCHANGE, NOTHING),
        seems_unchanged,
        FIRST,
        WEAK,
    ),
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
    case.check(memory)
