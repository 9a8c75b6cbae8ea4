# SPDX-License-Identifier: GPL-3.0-only
"""Runs one counting method in its own process: it counts once for each input line."""

import json
import resource
import sys
import time
from collections.abc import Mapping

from tests.benchmarks import counting_methods
from tests.benchmarks.hold import PORTS

METHODS = {
    "ss": counting_methods.ss,
    "psutil": counting_methods.psutil,
    "items": counting_methods.items,
    "scan": counting_methods.scan,
    "dump": counting_methods.dumped,
    "dump_info": counting_methods.dumped_info,
}


def main() -> None:
    name, sockets = sys.argv[1:]
    method = METHODS[name](int(sockets))
    _send({"ready": name})
    for _ in sys.stdin:
        _send(_once(method))


def _once(method: counting_methods.CountMethod) -> dict[str, object]:
    cpu_before_s, start_s = _cpu_s(), time.perf_counter()
    counted = method()
    wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s() - cpu_before_s
    return {"wall_s": wall_s, "cpu_s": cpu_s, **_count(counted)}


def _cpu_s() -> float:
    """Return the CPU time of this process and of its child processes that have ended."""
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


def _send(what: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
