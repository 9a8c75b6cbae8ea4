# SPDX-License-Identifier: GPL-3.0-only
"""What differs between the tracker and the socket tables, and which of them is right.

The program is attached before the tables are read, so a connection can open or
close at any point of seeding. `seed` takes these steps:

1. look at the tables: what is established becomes a seed, in one bulk update;
2. take out of the seeds what the tracepoint has told of;
3. look again: a seed that is not there any more is doubtful;
4. look at the tables once more if there are doubtful seeds, and take out those
   that are not there again.

For a connection, against those steps:

a. Open before the program was attached, and still open after 4: a seed from 1
   on. Only the kernel takes it out, when it closes.
b. Opened before 1 while the program was attached: in ``tracked`` with the
   kernel's timestamp, and a seed by 1. Step 2 removes the seed.
c. Opened after 1: in ``tracked`` alone. Nothing here touches that map, so no
   timestamp of the kernel's is ever lost.
d. Seen by 1, closed before it became a seed: the kernel found no seed to take
   out. It is in neither look at 3 and 4, and goes.
e. As d, and its address pair opened anew before 2: the kernel has told of the
   new one, so 2 removes the seed (b).
f. As d, and opened anew between 2 and 4: the kernel takes the stale seed out
   when it tells of the new one.
g. Closed after it became a seed: the kernel takes it out. If 4 does so as
   well, nothing is lost: what it names is not in the table.
h. Open all the time, but hidden from one look by its neighbours (see
   `SocketTables.established`): it is a seed if 1 saw it, and stays unless both
   3 and 4 miss it.

Removing a seed is right at any time after its connection has closed, and a
successor is never a seed, so no step has to be atomic with another.

One window stays: the kernel tells of a close just before it stores the new
state, and a task can be preempted between the two. A seed added in that window
by 1, for a socket that 3 still shows as established, stays.
"""

import logging
from collections.abc import Callable

import numpy as np

from tcpexporter.connections import Records, contains
from tcpexporter.tracker import Tracker

log = logging.getLogger(__name__)


def seed(tracker: Tracker, established: Callable[[], Records]) -> None:
    """Add the connections that are older than the tracker.

    Args:
        tracker: already attached.
        established: a look at the socket tables, of dtype `CONNECTION`.

    Raises:
        SourceError: the tables cannot be read, or the kernel refuses a map operation.
    """
    seeds = established()
    if refused := tracker.add_seeds(seeds):
        log.warning(
            "%s of the %s connections from before are not counted: raise --max-connections",
            refused,
            len(seeds),
        )
    for chunk in tracker.tracked():
        told = chunk["key"]
        tracker.remove_seeds(told[contains(told, seeds["key"])])
    doubtful = seeds["key"]
    for _ in range(2):
        doubtful = doubtful[~contains(doubtful, established()["key"])]
        if not len(doubtful):
            return
    tracker.remove_seeds(np.unique(doubtful))
