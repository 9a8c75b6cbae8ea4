# SPDX-License-Identifier: GPL-3.0-only
"""Exits with 0 if the exporter of this container is ready: the HEALTHCHECK of the images.

The address is that of TCPEXPORTER_LISTEN. If it is set by a flag, or if the exporter uses
TLS or passwords, choose another health check.
"""

import http.client
import os
import sys


def is_ready(listen: str) -> bool:
    """Return whether the exporter that listens there answers /-/ready with 200."""
    host, _, port = listen.rpartition(":")
    address = host.strip("[]") or "localhost"
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_ready(os.environ.get("TCPEXPORTER_LISTEN") or "9690"))
