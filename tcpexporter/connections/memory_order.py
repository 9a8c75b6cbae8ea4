# SPDX-License-Identifier: GPL-3.0-only
"""Orders loads and stores where the CPU does not; says why reading needs no lock.

x86-64 has *total store order*: every CPU sees the stores of another one in program order,
and performs its own loads in program order. Only a load may overtake an earlier store. On
other machines, such as arm64, loads and stores of different locations may be performed in
any order, unless one of these orders them:

- In the BPF program, ``order_stores``: an exchange, or two pops of an empty stack.
- In userspace, `memory_barrier`: it releases a lock and then acquires it again. No earlier
  access moves behind the release, no later one before the acquisition, and Armv8 never
  exchanges these two. Acquiring and then releasing orders nothing: earlier and later
  accesses may both move in between. membarrier(2) does not help: it reaches the CPUs that
  run threads of this process, and the BPF program runs in any task.
- A dependency: a load from an address that an earlier load found follows that load, even if
  the program has stored the address on its stack in between.
- The kernel: an update of a hash map publishes the entry by a store with release. A push
  and a pop take the lock of the stack. The kernel runs the program under the lock of the
  socket, and stores the socket's new state with release.
- `Runs.wait`: for each run of the program, one of two things holds. The run has
  ended when the call returns, and all its stores are visible. Or the run sees all that was
  stored before the call.

These are the cases. tests/unit/ordering tries all orders of each.

1. A word alone. It is written by one store and copied by loads of at least 8 aligned bytes.
   So a count has the series and time of one connection.
2. A word, then the record or the client of the slot, then the word again, which has not
   changed. The word is stored after the record, and loaded before it, each time with a
   barrier in between: so the record is not older than the word. A later record follows
   `CLOSED`: between the closing and the next opening, the socket's lock is released and one
   is acquired. The reader has a barrier before it loads the word again: so the record is
   not newer. A reader that compares the word, then the client, with those of the last
   reading has one barrier, between the two: so the client is not older than the word. A
   newer client that differs makes the reader read the slot as above.
3. As 2, but the closing was missed. Then one run stores `CLOSED` and the next record,
   without a lock in between. It calls ``order_stores`` for that.
4. As 2, but userspace frees the slot in between. It stores `CLOSED` and clears the handle,
   then pushes the slot; the next owner pops it, then writes. The stack's lock orders both.
   In userspace, only the thread that frees slots reads handles, so these two stores need no
   order. For the program, see 6.
5. A seed: userspace stores the record, adds the handle to the map, calls `memory_barrier`,
   and stores the word. A run that finds the handle follows dependencies to the record.
6. A handle in ``find``. Its entry can be reused for a slot that was freed, after the handle
   of that slot was cleared: 4. The load of the handle depends on the load of the slot. So
   the run does not find its own handle in a slot that is not its own.
7. A series number, as 6: its ledger entry is cleared before the number is pushed. A run
   that pops it stores the series, then publishes the number. A run that finds the number in
   the map follows dependencies to the series. In an entry that is reused it may find the
   number first; then the series is still cleared, and it treats its own as not found.
8. A word, then the ledger, which must have the series. A run or userspace stores the series
   first: 7. ``order_stores`` or `memory_barrier` comes before the word, as in 2 and 5. On
   another CPU than that of the run that stored the series, it orders what that run stored
   too, because all CPUs see a store at once (*multi-copy atomicity*). The reader has a
   barrier in between.
9. The ledger, then words, then the ledger again, with the same series for a number. A
   number is reused when no connection has it and all runs have ended: so a word with the
   number is of that series.
10. The closings log and seeds: a run records its closing, then looks for the seed.
    Userspace adds the seed, then reads the log; the kernel looks at an empty bucket of it
    without a lock. A load may overtake a store, also on x86-64, so each could miss what the
    other has stored. Userspace calls `Runs.wait` in between: a run that has not
    found the seed has ended, and the log has its closing.
11. The flag ``recording``: `Runs.wait` follows its store.
12. A slot that is freed: `Runs.wait` comes between the deletion of its handle
    and the load of its word. The same applies to series numbers.
13. A dump of the socket tables, then the tracker. The kernel stores the state after the
    program has stored the word, with release. `memory_barrier` comes between the dump and
    the loads of words. If another thread has read the dump, it hands it over by a lock.
14. Counters of the ledger: each is changed by atomic additions and loaded alone, so none is
    lost and none decreases. Counters that belong together may differ while they change.
15. Pinned state is read by 2 and 9, while the old program writes to it. Version 1 of its
    layout, which had a connection's series and time in two words, has no order for that; it
    was for x86-64 only.
16. The caches of the program. Userspace turns them off by the epoch, deletes keys,
    waits, frees what is unused, and stores an epoch that was never used. A run that had
    loaded the previous epoch may have found a key in a cache. It has ended after the wait,
    like a run that has found it in the map. A run that loads the next epoch began after the
    deletion, because the store follows the wait. So it finds in a cache only what such runs
    have found in the map after the deletion. What is found in a cache is compared with the
    record or the ledger, as in 6 and 7.
"""

import os
import threading

IS_TOTAL = os.uname().machine == "x86_64"
"""Whether the machine has total store order."""

_lock = threading.Lock()


def memory_barrier() -> None:
    """Perform all earlier loads and stores of this thread before all later ones.

    With total store order it does nothing: then loads and stores are ordered, except a load
    after a store, and no caller of this function depends on the order of these two.
    """
    if IS_TOTAL:
        return
    with _lock:
        pass  # the release orders what comes before it
    with _lock:
        pass  # the acquisition orders what comes after it
