# SPDX-License-Identifier: GPL-3.0-only
"""Wires the modules together, in phases: listen, open, confine, serve.

The order makes the exporter secure. Everything that requires root is opened first: a port
below 1024, the BPF program, socket tables of other namespaces, files that only root can
read. Then `phases.confine` gives up root. The exporter answers no client before that:
`phases.serve` is last.

The loader takes most of the time: a quarter of a second. It starts as soon as the settings
are valid and the port is bound, and this process imports `phases` meanwhile. So this module
and those that it imports do not import numpy, asyncio or the metrics library, which take as
long.
"""

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tcpexporter.config.misleading import in_environment, misleading, unprefixed
from tcpexporter.config.reload import ReloadSignal
from tcpexporter.config.settings import Settings, naming_origins, parse
from tcpexporter.ebpf.loading import Loading
from tcpexporter.errors import SourceError
from tcpexporter.host import stderr, stdout
from tcpexporter.host.systemd import Supervisor
from tcpexporter.request import begin_loading
from tcpexporter.web.listen import listen

log = logging.getLogger("tcpexporter")


class Process(NamedTuple):
    """Objects that `main` makes before the settings are read."""

    argv: Sequence[str]
    """The arguments, without the program's name."""
    environ: Mapping[str, str]
    supervisor: Supervisor
    reload_signal: ReloadSignal
    errors: stderr.Stderr


def run(process: Process, set_up_logging: Callable[[str, str], None]) -> None:
    """Serve the metrics, or run the command that the settings select.

    Args:
        process: the arguments, the environment, and objects made before start-up.
        set_up_logging: called with the values of --log-level and --log-format.

    Raises:
        SettingsError: a setting is invalid.
        TcpExporterError: a part of the exporter cannot start, or has failed.
    """
    settings = parse(process.argv, process.environ)
    set_up_logging(settings.log_level, settings.log_format)
    with naming_origins(settings):
        _run_command(settings, process)


def _run_command(settings: Settings, process: Process) -> None:
    if settings.features:
        _print_features()
    elif settings.unpin:
        _unpin(settings.pin)
    else:
        _log_settings(settings)
        if settings.check or settings.once:
            _run_without_http(settings, process.supervisor)
        else:
            _run(settings, process)


def _run(settings: Settings, process: Process) -> None:
    """Serve until a signal arrives."""
    with contextlib.ExitStack() as resources:
        listening = _listen(settings, resources)
        loading = _begin_loading(settings, resources)
        from tcpexporter import phases  # noqa: PLC0415  while the loader compiles

        opened = phases.open_all(settings, process, loading, resources)
        phases.confine(opened.account, opened.counting, opened.registry, opened.code)
        phases.serve(listening, opened, settings, process)


def _listen(settings: Settings, resources: contextlib.ExitStack) -> list[socket.socket]:
    """Return the listening sockets; the kernel queues clients until the last phase."""
    listening = listen(settings.listen_address, settings.listen_port)
    for each in listening:
        resources.enter_context(each)
        log.info("listening on %s, port %s", *each.getsockname()[:2])
    return listening


def _begin_loading(settings: Settings, resources: contextlib.ExitStack) -> Loading | None:
    """Return a running loader; None: none is required, or it cannot be started.

    In the latter case `open_all` tries once more, and reports the error or polls instead.
    """
    if settings.source not in ("auto", "ebpf"):
        return None
    with contextlib.suppress(SourceError):
        return resources.enter_context(contextlib.closing(begin_loading(settings)))
    return None


def _run_without_http(settings: Settings, supervisor: Supervisor) -> None:
    # They import numpy, which other commands do not require.
    from tcpexporter import checking, phases  # noqa: PLC0415

    if settings.check:
        checking.check(settings)
    else:
        phases.run_once(settings, supervisor)


def _unpin(directory: str | None) -> None:
    # It imports numpy, which other commands do not require.
    from tcpexporter.ebpf import pins  # noqa: PLC0415

    path = Path(directory or pins.DEFAULT)
    done = "removed what was pinned in" if pins.remove(path) else "nothing is pinned in"
    stdout.write(f"{done} {path}\n".encode())


def _print_features() -> None:
    # Imported only when it is used: it uses 0.6 MiB of memory.
    from tcpexporter.ebpf.features import Kernel, table  # noqa: PLC0415

    stdout.write(table(Kernel()).encode())


def _log_settings(settings: Settings) -> None:
    """Log which settings the environment gave, and warn of those without effect."""
    if given := in_environment(settings):
        log.info("settings from the environment: %s", ", ".join(given))
    for sentence in (*unprefixed(settings), *misleading(settings)):
        log.warning("%s", sentence)
