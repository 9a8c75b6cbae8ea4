# SPDX-License-Identifier: GPL-3.0-only
"""A model checker: it tries every order in which CPUs can perform a few reads and writes.

A thread is a list of operations in program order. The memory is one: what one CPU has
written, every other CPU sees (x86-64 and Armv8 are *multi-copy atomic*). But a CPU performs
its operations in any order that its `Memory` allows. `explore` visits each reachable state
once, and returns all results.

What `Memory.ARM64` keeps in order is the *ordered-before* relation of the Armv8 memory
model (Arm Architecture Reference Manual, B2.3): barriers, acquire and release, an acquire
after a release, address and data dependencies, control dependencies to writes, and accesses
to one location. A read may take the value of an earlier write of its own thread that is not
performed yet. Two reads of one location may be performed in the other order if both find
the same write. Everything else may be performed in any order: a read is even performed
before a condition that it depends on is known. test_litmus.py compares the checker with
published results.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple, TypeAlias

Values: TypeAlias = Mapping[str, int]
"""What reads have found, by their names."""

Result: TypeAlias = dict[str, int]
"""What all reads have found, by their names, and the final memory, by its locations."""


class Memory(Enum):
    """The order in which a CPU performs the operations of a thread."""

    SEQUENTIAL = "program order"
    X86_64 = "x86-64: total store order"
    ARM64 = "arm64: Armv8"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A step of a thread."""

    needs: tuple[str, ...] = ()
    """The reads whose values the address or the value depends on."""
    only_if: Callable[[Values], bool] | None = None
    """A condition; if it is false, the operation does nothing."""
    decides: tuple[str, ...] = ()
    """The reads whose values the condition depends on."""
    is_acquire: bool = False
    is_release: bool = False


@dataclass(frozen=True)
class Read(Operation):
    """Read a location; the value gets a name."""

    name: str
    location: str | Callable[[Values], str]


@dataclass(frozen=True)
class Write(Operation):
    """Write to a location."""

    location: str
    value: int | Callable[[Values], int]


@dataclass(frozen=True)
class Add(Operation):
    """Add to a location by an atomic operation that orders nothing, as BPF_ADD does."""

    location: str
    value: int


@dataclass(frozen=True)
class Barrier(Operation):
    """A full barrier: ``dmb ish``, ``mfence``, or ``swpal`` of a word of its own."""


@dataclass(frozen=True)
class Lock(Operation):
    """Wait until a lock is free, and acquire it."""

    location: str


@dataclass(frozen=True)
class Await(Operation):
    """Wait, by an acquiring read, until a location has a value."""

    location: str
    value: int


@dataclass(frozen=True)
class BeginWaiting(Operation):
    """The first half of synchronize_rcu(): find the runs that are under way."""


@dataclass(frozen=True)
class EndWaiting(Operation):
    """The second half: wait until these runs have ended."""


def lock(location: str) -> Lock:
    return Lock(location, is_acquire=True)


def unlock(location: str) -> Write:
    return Write(location, 0, is_release=True)


def wait_for_runs() -> list[Operation]:
    """Wait for all threads that are runs and have begun, as `Tracker.wait_for_runs` does.

    synchronize_rcu() is a full barrier at both ends.
    """
    return [Barrier(), BeginWaiting(), EndWaiting(), Barrier()]


@dataclass(frozen=True)
class Thread:
    """Operations in program order."""

    operations: Sequence[Operation]
    is_run: bool = False
    """Whether it is a run of the BPF program, for which `wait_for_runs` waits."""

    @cached_property
    def reads(self) -> dict[str, int]:
        """The index of each read, by its name."""
        return {
            each.name: at
            for at, each in enumerate(self.operations)
            if isinstance(each, Read)
        }

    def before(self, memory: Memory) -> list[int]:
        """Return, for each operation, a bit mask of those that must be performed before."""
        return [
            sum(1 << at for at in range(end) if self._is_ordered(at, end, memory))
            for end in range(len(self.operations))
        ]

    def _is_ordered(self, first: int, second: int, memory: Memory) -> bool:
        a, b = self.operations[first], self.operations[second]
        named = isinstance(a, Read) and a.name
        if named and named in (*b.needs, *(b.decides if _writes(b) else ())):
            return True
        if _is_barrier(a) or _is_barrier(b) or memory is Memory.SEQUENTIAL:
            return True
        if memory is Memory.X86_64:
            is_plain_write = isinstance(a, Write) and isinstance(b, Read | Await)
            return not is_plain_write or (_may_be_same(a, b) and isinstance(b, Await))
        if a.is_acquire or b.is_release or (a.is_release and b.is_acquire):
            return True
        return _may_be_same(a, b) and _writes(b)


def _writes(each: Operation) -> bool:
    return isinstance(each, Write | Add | Lock)


def _is_barrier(each: Operation) -> bool:
    return isinstance(each, Barrier | BeginWaiting | EndWaiting)


def _location(each: Operation) -> str | None:
    """Return the location that an operation always accesses; None: it has none, or any."""
    found = getattr(each, "location", None)
    return found if isinstance(found, str) else None


def _may_be_same(one: Operation, other: Operation) -> bool:
    return _location(one) is not None and _location(one) == _location(other)


class _Found(NamedTuple):
    """What a read has found."""

    value: int
    version: int
    """How many writes to the location had been performed; -1: an own write that was not."""
    location: str


class _State(NamedTuple):
    memory: tuple[tuple[int, int], ...]
    """The value of each location, and how many writes to it have been performed."""
    performed: tuple[int, ...]
    """For each thread, a bit mask of its operations."""
    found: tuple[tuple[_Found | None, ...], ...]
    """For each thread, what its reads have found."""
    awaited: tuple[tuple[int, ...] | None, ...]
    """For each thread that is between `BeginWaiting` and `EndWaiting`: the runs."""


@dataclass(frozen=True)
class Explored:
    """All results of some threads."""

    results: list[Result]
    states: int
    """How many states were visited."""

    def having(self, is_wanted: Callable[[Result], bool]) -> list[Result]:
        """Return the results for which a function is true."""
        return [each for each in self.results if is_wanted(each)]


def explore(
    threads: Sequence[Thread], memory: Memory, initially: Mapping[str, int] | None = None
) -> Explored:
    """Try all orders.

    Args:
        threads: what runs at the same time. Names of reads are distinct.
        memory: the order that the CPUs keep.
        initially: the memory at the start; other locations are 0.

    Returns:
        The results of the orders in which all threads end.
    """
    return _Exploration(threads, memory, initially or {}).explored()


@dataclass
class _Exploration:
    threads: Sequence[Thread]
    memory: Memory
    initially: Mapping[str, int]
    locations: list[str] = field(init=False)
    before: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        named = {_location(each) for every in self.threads for each in every.operations}
        self.locations = sorted({each for each in named if each} | {*self.initially})
        self.before = [each.before(self.memory) for each in self.threads]

    def explored(self) -> Explored:
        count = len(self.threads)
        first = _State(
            tuple((self.initially.get(each, 0), 0) for each in self.locations),
            (0,) * count,
            tuple((None,) * len(each.operations) for each in self.threads),
            (None,) * count,
        )
        visited, waiting = {first}, [first]
        results: dict[tuple[tuple[str, int], ...], Result] = {}
        while waiting:
            state = waiting.pop()
            if all(self._has_ended(state, each) for each in range(count)):
                result = self._result(state)
                results[tuple(sorted(result.items()))] = result
                continue
            for following in self._following(state):
                if following not in visited:
                    visited.add(following)
                    waiting.append(following)
        return Explored([*results.values()], len(visited))

    def _has_ended(self, state: _State, thread: int) -> bool:
        return state.performed[thread] == (1 << len(self.threads[thread].operations)) - 1

    def _result(self, state: _State) -> Result:
        result = {
            name: value
            for name, (value, _) in zip(self.locations, state.memory, strict=True)
        }
        for thread in range(len(self.threads)):
            result |= self._values(state, thread)
        return result

    def _values(self, state: _State, thread: int) -> dict[str, int]:
        return {
            name: found.value
            for name, at in self.threads[thread].reads.items()
            if (found := state.found[thread][at]) is not None
        }

    def _following(self, state: _State) -> Iterable[_State]:
        for thread, each in enumerate(self.threads):
            performed = state.performed[thread]
            for at, operation in enumerate(each.operations):
                before = self.before[thread][at]
                if not performed >> at & 1 and performed & before == before:
                    yield from self._performed(state, thread, at, operation)

    def _performed(
        self, state: _State, thread: int, at: int, operation: Operation
    ) -> Iterable[_State]:
        """Yield the state after an operation; nothing if it must wait."""
        done = state._replace(
            performed=_set(state.performed, thread, state.performed[thread] | 1 << at)
        )
        values = self._values(state, thread)
        is_decided = all(name in values for name in operation.decides)
        if operation.only_if and is_decided and not operation.only_if(values):
            yield done
            return
        match operation:
            case Read():
                yield from self._read(done, thread, at, operation, values)
            case Write(location=location, value=value):
                yield self._stored(
                    done, location, value(values) if callable(value) else value
                )
            case Add(location=location, value=value):
                yield self._stored(done, location, value + self._at(state, location)[0])
            case Lock(location=location):
                if self._at(state, location)[0] == 0:
                    yield self._stored(done, location, 1)
            case Await(location=location, value=value):
                if self._at(state, location)[0] == value:
                    yield done
            case BeginWaiting():
                yield done._replace(
                    awaited=_set(done.awaited, thread, self._under_way(state))
                )
            case EndWaiting():
                awaited = state.awaited[thread] or ()
                if all(self._has_ended(state, each) for each in awaited):
                    yield done._replace(awaited=_set(done.awaited, thread, None))
            case _:
                yield done

    def _at(self, state: _State, location: str) -> tuple[int, int]:
        return state.memory[self.locations.index(location)]

    def _stored(self, state: _State, location: str, value: int) -> _State:
        at = self.locations.index(location)
        _, version = state.memory[at]
        return state._replace(memory=_set(state.memory, at, (value, version + 1)))

    def _under_way(self, state: _State) -> tuple[int, ...]:
        return tuple(
            each
            for each, thread in enumerate(self.threads)
            if thread.is_run and state.performed[each] and not self._has_ended(state, each)
        )

    def _read(
        self, done: _State, thread: int, at: int, operation: Read, values: Values
    ) -> Iterable[_State]:
        location = operation.location
        where = location(values) if callable(location) else location
        found = self._forwarded(done, thread, at, where, values)
        if found is None:
            found = _Found(*self._at(done, where), where)
        if self.memory is Memory.ARM64 and not self._is_coherent(done, thread, at, found):
            return
        mine = _set(done.found[thread], at, found)
        yield done._replace(found=_set(done.found, thread, mine))

    def _forwarded(
        self, state: _State, thread: int, at: int, location: str, values: Values
    ) -> _Found | None:
        """Return the last write of a thread before a read, if it is not performed yet."""
        for earlier in reversed(range(at)):
            operation = self.threads[thread].operations[earlier]
            if isinstance(operation, Write) and operation.location == location:
                if state.performed[thread] >> earlier & 1:
                    return None
                value = operation.value
                found = value(values) if callable(value) else value
                return _Found(found, -1 - earlier, location)
        return None

    def _is_coherent(self, state: _State, thread: int, at: int, found: _Found) -> bool:
        """Return whether no later read of the same location found an earlier write."""
        later = state.found[thread][at + 1 :]
        return all(
            each.version == found.version
            for each in later
            if each is not None and each.location == found.location and each.version >= 0
        )


def _set(items: tuple, at: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:at], value, *items[at + 1 :])
