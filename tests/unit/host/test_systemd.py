# SPDX-License-Identifier: GPL-3.0-only
"""The environment variables that systemd sets."""

import os

import pytest

from tcpexporter.host.systemd import Supervisor


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "3 s"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
    ],
)
def test_the_watchdog_belongs_to_one_process(
    environ: dict[str, str], watchdog_s: float | None
) -> None:
    """An invalid time is ignored. The variables are removed, so no child process
    inherits them."""
    environ = {**environ, "HOME": "/"}
    supervisor = Supervisor.of(environ)
    assert supervisor._watchdog_s == watchdog_s
    assert supervisor.fileno() is None
    assert environ == {"HOME": "/"}


def test_an_address_of_another_family_gives_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The address is of family vsock; nothing is sent."""
    supervisor = Supervisor("vsock:2:1234", None)
    supervisor.tell("READY=1")
    (warning,) = caplog.messages
    assert warning.startswith("cannot send notifications to systemd at vsock:2:1234: ")
