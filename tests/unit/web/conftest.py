# SPDX-License-Identifier: GPL-3.0-only
"""Serves an application until the end of a test."""

import contextlib
from collections.abc import Iterator

import pytest

from tcpexporter.web import pages
from tcpexporter.web.listen import listen as listen_at
from tests.unit.web.support import (
    LOOPBACK,
    Start,
    serving,
)


@pytest.fixture
def start() -> Iterator[Start]:
    """Serve in a thread, at a free port, until the end of the test."""
    with contextlib.ExitStack() as running:

        def start_one(app: pages.App, address: str | None = LOOPBACK) -> int:
            sockets = listen_at(address, 0)
            port: int = sockets[0].getsockname()[1]
            running.enter_context(serving(app, sockets))
            return port

        yield start_one
