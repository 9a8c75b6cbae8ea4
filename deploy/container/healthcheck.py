# SPDX-License-Identifier: GPL-3.0-only
"""Exits with 0 if the exporter of this container is ready: the HEALTHCHECK of the image.

The port is that of TCPEXPORTER_LISTEN. If it is set by a flag, or with TLS, use another
health check.
"""

import http.client
import os
import sys


def is_ready(listen: str) -> bool:
    """Return whether the exporter that listens there answers /-/ready with 200."""
    host, _, port = listen.rpartition(":")
    connection = http.client.HTTPConnection(
        host.strip("[]") or "localhost", int(port), timeout=10
    )
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_ready(os.environ.get("TCPEXPORTER_LISTEN") or "9690"))
