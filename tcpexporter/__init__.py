# SPDX-License-Identifier: GPL-3.0-only
"""A Prometheus exporter of long-term TCP connections."""

import os

# tcpexporter does not use numpy's linear algebra. Its threads would use memory. They would
# also keep capabilities: the exporter drops capabilities only in the main thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
