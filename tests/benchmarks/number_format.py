# SPDX-License-Identifier: GPL-3.0-only
"""Formats numbers with two or three significant digits and a suitable unit."""

from collections.abc import Sequence

from tests.benchmarks.figures import MIB_BYTES, Unit

MOST_BYTES = 10_000


def format_value(value: float, unit: Unit) -> str:
    match unit:
        case Unit.SECONDS:
            return format_seconds(value)
        case Unit.NANOSECONDS:
            return f"{value:.0f} ns"
        case Unit.BYTES:
            return format_bytes(value)
        case Unit.RATIO:
            return f"{value * 100:.2g} %"
        case Unit.TIMES:
            return f"{value:.3f}"
        case Unit.PER_SECOND:
            return f"{value:,.0f} /s"


def format_seconds(value_s: float) -> str:
    if value_s < 0.001:
        return f"{format_digits(value_s * 1e6)} µs"
    return (
        f"{format_digits(value_s * 1e3)} ms"
        if value_s < 1
        else f"{format_digits(value_s)} s"
    )


def format_bytes(value_bytes: float) -> str:
    if value_bytes < MOST_BYTES:
        return f"{value_bytes:.0f} bytes"
    return f"{format_digits(value_bytes / MIB_BYTES)} MiB"


def format_digits(value: float) -> str:
    """Format a number with two or three significant digits, without an exponent."""
    for places, least in ((0, 100), (1, 10), (2, 0.1), (4, 0)):
        if abs(value) >= least:
            return f"{value:,.{places}f}"
    raise AssertionError


def format_spread(samples: Sequence[float], unit: Unit) -> str:
    """Format the smallest sample, the largest one, and the number of samples."""
    if len(samples) == 1:
        return "1 sample"
    least, most = (format_value(end(samples), unit) for end in (min, max))
    return f"{least} to {most}, {len(samples)} samples"
