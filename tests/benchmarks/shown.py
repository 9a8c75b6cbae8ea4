# SPDX-License-Identifier: GPL-3.0-only
"""How numbers are written: three digits and a unit that suits their size."""

from collections.abc import Sequence

from tests.benchmarks.figures import MIB_BYTES, Unit

SMALLEST_KIB = 1 << 12


def shown(value: float, unit: Unit) -> str:
    match unit:
        case Unit.SECONDS:
            return seconds(value)
        case Unit.NANOSECONDS:
            return f"{value:.0f} ns"
        case Unit.BYTES:
            return size(value)
        case Unit.RATIO:
            return f"{value * 100:.2g} %"
        case Unit.TIMES:
            return f"{value:.3f}"
        case Unit.PER_SECOND:
            return f"{value:,.0f} /s"


def seconds(value_s: float) -> str:
    if value_s < 0.001:
        return f"{digits(value_s * 1e6)} µs"
    return f"{digits(value_s * 1e3)} ms" if value_s < 1 else f"{digits(value_s)} s"


def size(value_bytes: float) -> str:
    if value_bytes < SMALLEST_KIB:
        return f"{value_bytes:.0f} bytes"
    return f"{digits(value_bytes / MIB_BYTES)} MiB"


def digits(value: float) -> str:
    """Two or three that matter, never as a power of ten."""
    for places, least in ((0, 100), (1, 10), (2, 0.1), (4, 0)):
        if abs(value) >= least:
            return f"{value:,.{places}f}"
    raise AssertionError


def spread(samples: Sequence[float], unit: Unit) -> str:
    """Smallest, largest and number of samples."""
    if len(samples) == 1:
        return "1 sample"
    least, most = (shown(end(samples), unit) for end in (min, max))
    return f"{least} to {most}, {len(samples)} samples"
