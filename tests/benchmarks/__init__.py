# SPDX-License-Identifier: GPL-3.0-only
"""Measures the figures in the README: ``python -m tests.benchmarks``, or ``make bench``."""
