# SPDX-License-Identifier: GPL-3.0-only
"""Constants of bpf/tcp_tracker.h for the loader process, which does not import numpy."""

RANGE_BITS = 8
"""Number of the low bits of an encoded range; they are its length minus one."""

RANGE_SLOTS = 1 << RANGE_BITS
"""The maximum length of a range."""

SERIES_RANGE = 32
"""The maximum length of a range of series numbers that were never used.

It is short, because reading the ledger ends after some ranges without a used number.
"""

SERIES_FIRST = 5
"""The lowest series number that is free at first."""
