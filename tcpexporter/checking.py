# SPDX-License-Identifier: GPL-3.0-only
"""Implements --check: prints what would run on this host, and disturbs no exporter."""

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tcpexporter.collecting import open_counting
from tcpexporter.config import summary
from tcpexporter.config.settings import Settings
from tcpexporter.ebpf import pin_directory
from tcpexporter.errors import ServerError
from tcpexporter.host import port_users, privileges, stdout
from tcpexporter.phases import open_guard, open_reader
from tcpexporter.web.listen import listen


def check(settings: Settings) -> None:
    """Print what would run on this host.

    The port is bound for a moment. Nothing is pinned, and the file of --state is not
    changed. Neither is locked, so this does not detect that another exporter uses one.

    Raises:
        TcpExporterError: the exporter would not start.
    """
    has_exporter = _bind(settings)
    tried = replace(settings, pin=None, state=None)
    with contextlib.ExitStack() as resources:
        account = privileges.find_account(tried.user)
        reader = open_reader(tried, account)
        if reader:
            resources.callback(reader.close)
        guard = open_guard(tried, reader) if reader else None
        source = open_counting(tried, resources).source.name
        url = summary.url(settings, has_tls=bool(guard and guard.tls_policy))
        lines = [
            f"count {summary.counted(settings)}, by {source}",
            summary.labels(settings),
            *map(summary.expected, settings.expect),
            f"serve {url}",
            *_kept(settings, source),
        ]
    said = "".join(f"would {each}\n" for each in lines)
    if has_exporter:
        said += (
            f"port {settings.listen_port} is in use by an exporter, which must end before"
            " another can start there\n"
        )
    stdout.write(said.encode())


def _bind(settings: Settings) -> bool:
    """Listen for a moment; return whether another exporter already listens there.

    Raises:
        ServerError: the exporter could not listen, for another reason.
    """
    try:
        for each in listen(settings.listen_address, settings.listen_port):
            each.close()
    except ServerError as error:
        cause = error.__cause__
        is_in_use = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        if is_in_use and port_users.has_exporter(settings.listen_port):
            return True
        raise
    return False


def _kept(settings: Settings, source: str) -> Iterator[str]:
    """Check and yield what a restart would find.

    Raises:
        PinError: the directory of --pin cannot be used.
        StateError: the file of --state cannot be used.
    """
    is_pinned = False
    if settings.pin and source == "ebpf":
        is_pinned = pin_directory.check(Path(settings.pin))
    if is_pinned:
        yield f"pin in {settings.pin}"
    if settings.state:
        # Imported only when it is used, as in `collecting`.
        from tcpexporter.socket_tables.saved_ages import State  # noqa: PLC0415

        State.check(Path(settings.state))
        yield f"restore ages from {settings.state}{'' if is_pinned else ', and save them'}"
