# SPDX-License-Identifier: GPL-3.0-only
"""Writes and reads the results of a run as a JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure, Unit
from tests.benchmarks.kernel import Map, Memory
from tests.benchmarks.sizes import Kept, Measured, Size, Start


@dataclass(frozen=True)
class Report:
    """The results and the conditions of one run."""

    date: str
    command: str
    took_s: float
    machine: Mapping[str, str | int]
    kernel: Mapping[str, str | int]
    versions: Mapping[str, str]
    load_average: Sequence[float]
    """Load averages over one minute, before and after the run."""
    other_exporters: int
    """Number of other exporters on the host, which slow down each state change a little."""
    tracked: int
    """Tracked connections while scrapes were timed."""
    idle_reconciliations: int
    """Reconciliations while idle."""
    state_changes: Mapping[str, int]
    """Numbers of state changes in all rounds that timed the BPF program, by kind."""
    figures: Sequence[Figure]
    sizes: Sequence[Size]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Report:
    """Read a report from its file."""
    fields: dict[str, Any] = json.loads(path.read_text())
    figures = [
        Figure(**{**each, "unit": Unit(each["unit"]), "samples": tuple(each["samples"])})
        for each in fields.pop("figures")
    ]
    sizes = [_size(each) for each in fields.pop("sizes")]
    return Report(figures=figures, sizes=sizes, **fields)


def _size(fields: dict[str, Any]) -> Size:
    contenders = [
        Measured(**{**each, "memory": _memory(each["memory"])})
        for each in fields.pop("contenders")
    ]
    starts, adoptions = (
        [_start(each) for each in fields.pop(name)] for name in ("starts", "adoptions")
    )
    kept, kept_full = _kept(fields.pop("kept")), _kept(fields.pop("kept_full"))
    return Size(
        contenders=contenders,
        starts=starts,
        adoptions=adoptions,
        kept=kept,
        kept_full=kept_full,
        **fields,
    )


def _start(fields: dict[str, Any]) -> Start:
    memory, settled = (Memory(**fields[name]) for name in ("memory", "settled"))
    return Start(fields["took_s"], memory, settled)


def _memory(fields: dict[str, Any] | None) -> Memory | None:
    return Memory(**fields) if fields else None


def _kept(fields: dict[str, Any] | None) -> Kept | None:
    if not fields:
        return None
    return Kept(**{**fields, "maps": [Map(**each) for each in fields["maps"]]})
