# SPDX-License-Identifier: GPL-3.0-only
"""One way to count, in a process of its own: counts once for each line that it reads."""

import json
import resource
import sys
import time
from collections.abc import Mapping

from tests.benchmarks import ways
from tests.benchmarks.hold import PORTS

WAYS = {
    "ss": ways.ss,
    "psutil": ways.psutil,
    "items": ways.items,
    "scan": ways.scan,
    "dump": ways.dumped,
    "dump_info": ways.dumped_info,
}


def main() -> None:
    name, sockets = sys.argv[1:]
    way = WAYS[name](int(sockets))
    _say({"ready": name})
    for _ in sys.stdin:
        _say(_once(way))


def _once(way: ways.Way) -> dict[str, object]:
    cpu_before_s, start_s = _cpu_s(), time.perf_counter()
    counted = way()
    wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s() - cpu_before_s
    return {"wall_s": wall_s, "cpu_s": cpu_s, **_count(counted)}


def _cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    used = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _count(counted: Mapping[int, int] | int) -> dict[str, object]:
    if isinstance(counted, int):
        return {"total": counted, "ports": None}
    return {
        "total": sum(counted.values()),
        "ports": [counted.get(port, 0) for port in PORTS],
    }


def _say(what: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
