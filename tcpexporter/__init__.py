# SPDX-License-Identifier: GPL-3.0-only
"""A Prometheus exporter of long-term TCP connections."""

import os

# numpy's linear algebra is not used here. Its threads would cost memory, and
# would keep the capabilities that the thread which starts them gives up.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
