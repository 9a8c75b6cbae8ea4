# SPDX-License-Identifier: GPL-3.0-only
"""Combines settings that were read again with those in force."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tcpexporter.config.settings import SETTINGS, Settings, value_in

FEWEST_OF_RANGE = 3
"""Minimum number of ports in a row that are shown as a range."""


@dataclass(frozen=True)
class Reread:
    """The result of reading the settings again while the exporter runs."""

    settings: Settings
    """The settings in force from now on."""
    changed: tuple[str, ...]
    """The changed values, such as ``duration is 30``."""
    waiting: tuple[str, ...]
    """The names of settings whose new values require a restart."""

    def __str__(self) -> str:
        restart = (
            [f"restart required for {', '.join(self.waiting)}"] if self.waiting else []
        )
        changed = [", ".join(self.changed)] if self.changed else []
        return (
            "; ".join(changed + restart)
            or "no change, or flags and environment variables override it"
        )


def reread(before: Settings, after: Settings) -> Reread:
    """Combine new settings with those in force; only four change without a restart."""
    names = [
        each.name for each in SETTINGS if value_in(before, each) != value_in(after, each)
    ]
    in_force = replace(
        before,
        duration_s=after.duration_s,
        ports=after.ports,
        expect=after.expect,
        log_level=after.log_level,
    )
    shown = {
        "duration": str(after.duration_s),
        "port": _shown_ports(after.ports),
        "expect": " ".join(map(str, after.expect)) or "none",
        "log-level": after.log_level,
    }
    return Reread(
        in_force,
        tuple(f"{each} is {shown[each]}" for each in names if each in shown),
        tuple(each for each in names if each not in shown),
    )


def _shown_ports(ports: Sequence[int]) -> str:
    """Return ports as a user writes them, with ranges: ``443,8000-8100``."""
    if not ports:
        return "all"
    in_a_row = itertools.groupby(enumerate(ports), lambda each: each[1] - each[0])
    ranges = [[port for _, port in row] for _, row in in_a_row]
    return ",".join(
        f"{each[0]}-{each[-1]}"
        if len(each) >= FEWEST_OF_RANGE
        else ",".join(map(str, each))
        for each in ranges
    )
