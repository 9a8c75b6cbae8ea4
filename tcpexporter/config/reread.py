# SPDX-License-Identifier: GPL-3.0-only
"""Combines settings that were read again with those in force."""

from dataclasses import dataclass, replace

from tcpexporter.config import summary
from tcpexporter.config.settings import SETTINGS, Settings, value_in


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
    applied = ("duration", "port", "expect", "log-level")
    shown = summary.flags(in_force)
    return Reread(
        in_force,
        tuple(
            f"{each} is {shown[f'--{each}'] or 'none'}" for each in names if each in applied
        ),
        tuple(each for each in names if each not in applied),
    )
