# SPDX-License-Identifier: GPL-3.0-only
"""A Prometheus exporter of long-term TCP connections."""
