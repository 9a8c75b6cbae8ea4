# SPDX-License-Identifier: GPL-3.0-only
"""Measures the figures in docs/performance.md; run with ``make bench``."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The root directory of the source tree."""
