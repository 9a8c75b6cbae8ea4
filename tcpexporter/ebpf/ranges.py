# SPDX-License-Identifier: GPL-3.0-only
"""Defines ranges of free numbers, without numpy: the loader process does not import it."""

RANGE_BITS = 8
"""Number of the low bits of an encoded range; they are its length minus one.

The BPF program has the same constant: bpf/tcp_tracker.h."""

RANGE_SLOTS = 1 << RANGE_BITS
"""The maximum length of a range."""

SERIES_RANGE = 32
"""The maximum length of a range of series numbers that were never used.

It is short, because a scrape reads some of these ranges: `series_numbers.UNTOUCHED_RANGES`.
"""
