# SPDX-License-Identifier: GPL-3.0-only
"""Sets limits of an exporter that runs."""

import subprocess

from tests.support import Exporter


def limit(exporter: Exporter, *limits: str) -> None:
    """As prlimit(1) takes them, with a colon behind the soft one that can be raised again.

    As the exporter's user: root itself would need CAP_SYS_RESOURCE, which some containers
    do not give it.
    """
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*as_nobody, "prlimit", f"--pid={exporter.process.pid}", *limits]
    subprocess.run(command, check=True)
