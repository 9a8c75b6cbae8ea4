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
from tcpexporter.web.listen import addresses, listen

_IN_USE = {
    port_users.User.EXPORTER: "port {port} is in use by an exporter, which must end before"
    " another can start there\n",
    port_users.User.HIDDEN: "port {port} is in use; only root can see by which process\n",
}
"""The line about a port in use, for the users of the port that are no error."""


def check(settings: Settings) -> None:
    """Print what would run on this host.

    The port is bound for a moment, without listen(2), so an exporter can start meanwhile.
    Nothing is pinned, and the file of --state is not changed. Neither is locked, so this
    does not detect that another exporter uses one.

    Raises:
        TcpExporterError: the exporter would not start.
    """
    in_use = _bind(settings)
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
    text = "".join(f"would {each}\n" for each in lines)
    stdout.write(f"{text}{in_use}".encode())


def _bind(settings: Settings) -> str:
    """Bind the port for a moment.

    Returns:
        A line to print if an exporter, or a process that this user cannot see, listens
        there. Otherwise an empty string.

    Raises:
        ServerError: the exporter could not listen, for another reason.
    """
    port = settings.listen_port
    try:
        for each in listen(settings.listen_address, port, only_bind=True):
            each.close()
    except ServerError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            raise
        user = port_users.find(port, addresses(settings.listen_address, port))
        if user not in _IN_USE:
            raise
        return _IN_USE[user].format(port=port)
    return ""


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

        # procfs has no socket cookies, so no age can be restored or saved.
        if State.check(Path(settings.state)) and source != "procfs":
            saving = "" if is_pinned else ", and save them"
            yield f"restore ages from {settings.state}{saving}"
